package guest

import (
	"net/netip"
)

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// scripts are the scenes that need more of the monitor than to run CMD.
var scripts = map[string]func(scene) int{}
