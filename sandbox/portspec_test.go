package sandbox

import (
	"net/netip"
	"strings"
	"testing"

	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/ports"
)

func TestParsePort(t *testing.T) {
	for _, row := range []struct {
		spec string
		want api.Port
	}{
		{"8080:80", api.Port{Proto: "tcp", HostPort: 8080, GuestPort: 80}},
		{"8080:80/tcp", api.Port{Proto: "tcp", HostPort: 8080, GuestPort: 80}},
		{"53:53/udp", api.Port{Proto: "udp", HostPort: 53, GuestPort: 53}},
		{"0:80", api.Port{Proto: "tcp", GuestPort: 80}},
		{"127.0.0.1:8080:80", api.Port{Proto: "tcp", HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8080, GuestPort: 80}},
		{"[::1]:8080:80", api.Port{Proto: "tcp", HostIP: netip.MustParseAddr("::1"), HostPort: 8080, GuestPort: 80}},
		{"[::ffff:192.0.2.1]:1:2", api.Port{Proto: "tcp", HostIP: netip.MustParseAddr("192.0.2.1"), HostPort: 1, GuestPort: 2}},
		{"8000-8009:9000-9009", api.Port{Proto: "tcp", HostPort: 8000, GuestPort: 9000, Count: 10}},
		{"8000-8000:9000", api.Port{Proto: "tcp", HostPort: 8000, GuestPort: 9000}},
		{"127.0.0.1:65534-65535:1-2/udp", api.Port{Proto: "udp", HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 65534, GuestPort: 1, Count: 2}},
	} {
		got, err := ports.ParsePort(row.spec)
		if err != nil || got != row.want {
			t.Errorf("%s: got %+v, %v; want %+v", row.spec, got, err, row.want)
			continue
		}
		if again, err := ports.ParsePort(ports.FormatPort(got)); err != nil || again != got {
			t.Errorf("%s: printed as %s, which reads as %+v, %v", row.spec, ports.FormatPort(got), again, err)
		}
	}
}

func TestParsePortSaysWhatIsWrong(t *testing.T) {
	for spec, want := range map[string]string{
		"":                      "for example 8080:80",
		"80":                    "for example 8080:80",
		"80:":                   `sandbox port: "": want a number from 1 to 65535`,
		":80":                   `host port: "": want a number from 0 to 65535`,
		"80:0":                  `sandbox port: "0": want a number from 1`,
		"80:65536":              `"65536"`,
		"+80:80":                `"+80"`,
		"80:80/sctp":            `protocol "sctp": want tcp or udp`,
		"80:80/":                `protocol ""`,
		"::1:80:80":             "stands in brackets",
		"host:80:80":            `address "host"`,
		"127.0.0.256:80:80":     `address "127.0.0.256"`,
		"10-5:80-85":            "runs backwards",
		"10-12:80-81":           "the host's range has 3 ports, the sandbox's 2",
		"0-1:80-81":             "a range cannot start at 0",
		"1000-2024:1000-2024":   "has 1025 ports: the limit is 1024",
		"1-65535:1-65535":       "the limit is 1024",
		"127.0.0.1:1:2:3":       `address "127.0.0.1:1"`,
		"80-:80-81":             `host port: ""`,
		"[127.0.0.1]x:80:80":    "address",
		"8080:80\x00/udp":       "sandbox port",
		"99999999999999999:80":  "host port",
		"127.0.0.1:80:80/udp/x": `protocol "udp/x"`,
	} {
		if p, err := ports.ParsePort(spec); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %+v, %v; want an error with %q", spec, p, err, want)
		}
	}
}

func FuzzParsePort(f *testing.F) {
	for _, s := range []string{"8080:80", "[::1]:1-2:3-4/udp", "0:1", "127.0.0.1:80:80/tcp"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, spec string) {
		p, err := ports.ParsePort(spec)
		if err != nil {
			return
		}
		if again, err := ports.ParsePort(ports.FormatPort(p)); err != nil || again != p {
			t.Errorf("%q: %+v prints as %q, which reads as %+v, %v", spec, p, ports.FormatPort(p), again, err)
		}
		if n := len(ports.Expand(p)); n < 1 || n > ports.MaxPortRange {
			t.Errorf("%q: %d ports", spec, n)
		}
		for _, one := range ports.Expand(p) {
			if one.GuestPort == 0 {
				t.Errorf("%q: a range runs over 65535", spec)
			}
		}
	})
}
