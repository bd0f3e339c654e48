//go:build !faults

package main

// reached is called at each step of a verb; only a test build sets it.
var reached func(step string) error
