package e2e

// The clients that only `make clients` installs and runs: rows of the matrix (aswithout_test.go).

var moreClients = []client{}
