// Package process starts workers and looks after them: one at a time, replaced when it dies or
// does not answer.
package process
