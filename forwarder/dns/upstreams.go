package dns

// resolv.conf(5), read the way glibc reads it.
//
// Part of the file is for us (servers, timeout, attempts, rotate, use-vc), and part is for the
// resolver library inside the sandbox (search, ndots, edns0, trust-ad, ...), which sees our address
// as its only server. ResolvConf passes the second part on.

import (
	"bytes"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds on the values in a resolv.conf. Timeout and attempts are capped as glibc caps them
// (RES_MAXRETRANS, RES_MAXRETRY).
const (
	MaxServers  = 8
	MaxSearch   = 32
	MaxTimeout  = 30 * time.Second
	MaxAttempts = 5

	// defaultTimeout is shorter than glibc's five seconds: the client in front of us runs such a
	// timer too, and one dead upstream must not use it up.
	defaultTimeout  = 2 * time.Second
	defaultAttempts = 2
)

// Upstreams is the host's resolver configuration. The zero value has no server: every forwarded
// question is answered with SERVFAIL.
type Upstreams struct {
	Servers  []netip.AddrPort `json:"servers"`
	Search   []string         `json:"search,omitempty"`
	Timeout  time.Duration    `json:"timeout,omitempty"`  // per try; zero: two seconds
	Attempts int              `json:"attempts,omitempty"` // rounds over all servers; zero: two
	Rotate   bool             `json:"rotate,omitempty"`
	UseVC    bool             `json:"useVC,omitempty"` // ask over TCP only

	// StubOptions are the options that concern the resolver library in the
	// sandbox, word for word ("ndots:5", "edns0", "trust-ad").
	StubOptions []string `json:"stubOptions,omitempty"`
}

// ParseResolvConf reads a resolv.conf. It never fails: like glibc, it skips what it does not
// understand. A file without a server yields none; there is no fallback to a server on this
// machine, unlike glibc's.
func ParseResolvConf(data []byte) Upstreams {
	var u Upstreams
	for line := range bytes.Lines(data) {
		if len(line) == 0 || line[0] == '#' || line[0] == ';' {
			continue
		}
		fields := strings.Fields(string(line))
		if len(fields) < 2 {
			if len(fields) == 1 && fields[0] == "search" {
				u.Search = nil
			}
			continue
		}
		switch fields[0] {
		case "nameserver":
			u.addServer(fields[1])
		case "domain", "search": // the last one wins
			if fields[0] == "domain" {
				fields = fields[:2]
			}
			u.Search = nil
			for _, s := range fields[1:] {
				if _, ok := parseName(s); ok && len(u.Search) < MaxSearch {
					u.Search = append(u.Search, s)
				}
			}
		case "options":
			for _, o := range fields[1:] {
				u.addOption(o)
			}
		}
	}
	return u
}

func (u *Upstreams) addServer(s string) {
	a, err := netip.ParseAddr(s)
	if err != nil || len(u.Servers) >= MaxServers {
		return
	}
	ap := netip.AddrPortFrom(a.Unmap(), 53)
	if !slices.Contains(u.Servers, ap) {
		u.Servers = append(u.Servers, ap)
	}
}

func (u *Upstreams) addOption(o string) {
	key, arg, _ := strings.Cut(o, ":")
	switch key {
	case "timeout", "attempts":
		n, err := strconv.Atoi(arg)
		if err != nil || n < 1 {
			return
		}
		if key == "attempts" {
			u.Attempts = min(n, MaxAttempts)
		} else {
			u.Timeout = min(time.Duration(min(n, 3600))*time.Second, MaxTimeout)
		}
	case "rotate":
		u.Rotate = true
	case "use-vc":
		u.UseVC = true
	case "ndots":
		n, err := strconv.Atoi(arg)
		if err != nil || n < 0 {
			return
		}
		u.addStubOption("ndots:" + strconv.Itoa(min(n, 15)))
	case "edns0", "trust-ad", "single-request", "single-request-reopen", "no-tld-query", "no-aaaa":
		u.addStubOption(key)
	}
}

func (u *Upstreams) addStubOption(o string) {
	key, _, _ := strings.Cut(o, ":")
	u.StubOptions = slices.DeleteFunc(u.StubOptions, func(have string) bool {
		k, _, _ := strings.Cut(have, ":")
		return k == key
	})
	u.StubOptions = append(u.StubOptions, o)
}

// ResolvConf returns the resolv.conf to show inside the sandbox: the given servers (ours), with the
// search list and the library's options passed on.
func (u Upstreams) ResolvConf(servers ...netip.Addr) []byte {
	var b bytes.Buffer
	if len(u.Search) > 0 {
		b.WriteString("search " + strings.Join(u.Search, " ") + "\n")
	}
	for _, s := range servers {
		b.WriteString("nameserver " + s.String() + "\n")
	}
	if len(u.StubOptions) > 0 {
		b.WriteString("options " + strings.Join(u.StubOptions, " ") + "\n")
	}
	return b.Bytes()
}

// Equal reports whether u and v are the same configuration.
func (u Upstreams) Equal(v Upstreams) bool {
	return slices.Equal(u.Servers, v.Servers) && slices.Equal(u.Search, v.Search) &&
		slices.Equal(u.StubOptions, v.StubOptions) && u.Timeout == v.Timeout &&
		u.Attempts == v.Attempts && u.Rotate == v.Rotate && u.UseVC == v.UseVC
}

func (u Upstreams) timeout() time.Duration {
	if u.Timeout <= 0 {
		return defaultTimeout
	}
	return min(u.Timeout, MaxTimeout)
}

func (u Upstreams) attempts() int {
	if u.Attempts <= 0 {
		return defaultAttempts
	}
	return min(u.Attempts, MaxAttempts)
}
