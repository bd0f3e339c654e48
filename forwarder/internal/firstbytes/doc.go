// Package firstbytes keeps the flows whose first bytes are waited for, and words the answers to
// those that are refused.
package firstbytes
