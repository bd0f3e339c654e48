package guest

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// The contents of the sandbox's resolv.conf(5), hosts(5) and nsswitch.conf(5) files.

func resolvText(cfg *Config) []byte {
	var b bytes.Buffer
	b.WriteString("# Made by sluice for this sandbox.\n")
	if len(cfg.Search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(cfg.Search, " "))
	}
	for _, a := range cfg.DNS {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	if len(cfg.ResolvOptions) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(cfg.ResolvOptions, " "))
	}
	return b.Bytes()
}

// maxHostsBytes bounds how much of the caller's hosts file is copied. Block lists of several
// megabytes are in use.
const maxHostsBytes = 16 << 20

// hostsText returns the sandbox's hosts file: localhost, the entries asked for, then the caller's
// entries without the names already given. If the caller's file gives its host name an address that
// is not in the sandbox, the name gets the guest's own address instead, because programs listen on
// what their host name resolves to.
func hostsText(cfg *Config, hostname string, callers []byte) []byte {
	var b bytes.Buffer
	b.WriteString("# Made by sluice for this sandbox.\n")
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	for _, h := range cfg.Hosts {
		fmt.Fprintf(&b, "%s\t%s\n", h.Addr, strings.Join(h.Names, " "))
	}
	rest, resolves := callersHosts(cfg, hostname, callers)
	if !resolves {
		for _, p := range []netip.Prefix{cfg.Addr4, cfg.Addr6} {
			if p.IsValid() {
				fmt.Fprintf(&b, "%s\t%s\n", p.Addr(), hostname)
			}
		}
	}
	for _, h := range rest {
		fmt.Fprintf(&b, "%s\t%s\n", h.Addr, strings.Join(h.Names, " "))
	}
	return b.Bytes()
}

// CallersHosts returns the entries of the caller's hosts file that a sandbox of cfg has in its own.
// If the file cannot be read, there are none.
func CallersHosts(cfg *Config) []HostEntry {
	callers, err := os.ReadFile(hostsFile)
	if err != nil {
		return nil
	}
	hostname, _ := os.Hostname()
	entries, _ := callersHosts(cfg, hostname, callers)
	return entries
}

// callersHosts returns the caller's entries without the names already given. resolves reports
// whether the host name has an address from either.
func callersHosts(cfg *Config, hostname string, callers []byte) (entries []HostEntry, resolves bool) {
	if len(callers) > maxHostsBytes {
		callers = callers[:bytes.LastIndexByte(callers[:maxHostsBytes], '\n')+1]
	}
	given := map[string]bool{"localhost": true, "ip6-localhost": true, "ip6-loopback": true}
	for _, h := range cfg.Hosts {
		for _, n := range h.Names {
			given[strings.ToLower(n)] = true
		}
	}
	own := strings.ToLower(hostname)
	resolves = own == "" || given[own]
	for line := range strings.Lines(string(callers)) {
		text, _, _ := strings.Cut(line, "#")
		f := strings.Fields(text)
		if len(f) < 2 {
			continue
		}
		addr, err := netip.ParseAddr(f[0])
		if err != nil {
			continue
		}
		names := slices.DeleteFunc(f[1:], func(n string) bool {
			n = strings.ToLower(n)
			if n == own && !given[n] {
				if addr.Unmap().IsLoopback() {
					resolves = true
					return false
				}
				return true
			}
			return given[n]
		})
		if len(names) > 0 {
			entries = append(entries, HostEntry{Addr: addr, Names: names})
		}
	}
	return entries, resolves
}

// nsswitchText returns the caller's file with its sources of host names replaced by hosts(5) and
// DNS, which our own resolver answers. Other sources, such as systemd-resolved, avahi, sssd and
// winbind, ask a daemon of the host, and its answers grant nothing.
func nsswitchText(callers []byte) []byte {
	var b bytes.Buffer
	b.WriteString("# The line of hosts is by sluice.\nhosts: files dns\n")
	for line := range strings.Lines(string(callers)) {
		text, _, _ := strings.Cut(line, "#")
		if name, _, _ := strings.Cut(text, ":"); strings.TrimSpace(name) != "hosts" {
			b.WriteString(line)
		}
	}
	return b.Bytes()
}
