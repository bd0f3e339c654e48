// Package firstbytes keeps the flows whose first bytes are awaited, and words the answers to
// refused ones.
package firstbytes
