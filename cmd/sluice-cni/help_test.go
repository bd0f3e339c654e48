package main

import (
	"testing"

	"sluice.dev/sluice/cmd/internal/helptest"
)

func TestHelp(t *testing.T) {
	helptest.Check(t, app)
}
