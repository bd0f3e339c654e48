// Package worker is the process that parses packets. It takes its configuration and descriptors,
// confines itself, and serves until it is told to end. The monitor trusts nothing that it says.
package worker
