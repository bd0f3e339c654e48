// Package gatetest is what clients say to a gate, for tests.
package gatetest
