// Package channel is the messages between monitor and worker, and the checks of both ends.
package channel
