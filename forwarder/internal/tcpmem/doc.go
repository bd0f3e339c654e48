// Package tcpmem charges what a TCP flow holds to the memory budget, and keeps it to its share.
package tcpmem
