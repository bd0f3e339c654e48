// Package channel defines the messages between monitor and worker, and the checks at both ends.
package channel
