// Package packet reads and writes packets: headers, packets to the sandbox that no endpoint of the
// stack sends, ICMP errors, and reports of dropped packets.
package packet
