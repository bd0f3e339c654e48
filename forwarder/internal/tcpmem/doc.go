// Package tcpmem charges the memory that a TCP flow holds to the memory budget, and keeps the flow
// to its share.
package tcpmem
