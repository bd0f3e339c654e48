// Package explain says why the host does not let this user have namespaces, and what to do about
// it.
package explain
