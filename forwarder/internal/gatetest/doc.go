// Package gatetest builds the bytes that clients send to a gate, for tests.
package gatetest
