// Package worker is the process that parses packets: configuration and descriptors in, confined,
// serving until it is told to end. The monitor takes nothing that it says on trust.
package worker
