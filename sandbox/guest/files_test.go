package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func init() {
	scripts["replace resolv.conf"] = replaceResolvConf
	scripts["list etc"] = listEtc
}

const wantResolv = "# Made by sluice for this sandbox.\nsearch example.test\nnameserver 10.0.2.3\noptions edns0\n"

func TestResolvConfIsOurs(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		for _, row := range []struct{ name, resolv string }{
			{"a file", ""},
			{"a link into /run", "link"},
			{"a dangling link", "dangling"},
			{"absent", "absent"},
		} {
			t.Run(row.name, func(t *testing.T) {
				s := scene{UID: uid, Config: baseConfig(), Resolv: row.resolv}
				if out := playShell(t, s, "cat /etc/resolv.conf"); out != wantResolv {
					t.Errorf("got %q", out)
				}
				out := playShell(t, s, "grep added.test /etc/hosts | tr '\\t' ' '; grep -c root /etc/passwd")
				if !strings.HasPrefix(out, "192.0.2.9 added.test\n") || strings.HasSuffix(out, "\n0\n") {
					t.Errorf("got %q", out)
				}
			})
		}
	})
}

// The host replaces its resolv.conf by rename, which detaches the sandbox's
// mount on the old one.
func TestResolvConfStaysOursWhenTheHostReplacesIt(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		for _, how := range []string{"", "dangling"} {
			s := scene{UID: uid, Resolv: how, Script: "replace resolv.conf", Config: baseConfig()}
			// CMD waits until what it sees has become the host's and changed back, or never
			// changed; the driver signals it by a file in the shared /etc.
			out := playShell(t, s, `until [ -e /etc/replaced ]; do sleep 0.01; done
i=0; until cmp -s /etc/resolv.conf /etc/wanted || [ $i -gt 500 ]; do sleep 0.01; i=$((i+1)); done; cat /etc/resolv.conf`)
			if out != wantResolv {
				t.Errorf("%q: got %q", how, out)
			}
		}
	})
}

func replaceResolvConf(s scene) int {
	g, err := Start(s.ctx(), s.Config)
	must(err)
	must(g.Release())
	must(os.WriteFile("/etc/wanted", []byte(wantResolv), 0o644))
	for i := range 5 {
		must(os.WriteFile("/etc/new", []byte(fmt.Sprintf("nameserver 192.0.2.%d\n", i)), 0o644))
		must(os.Rename("/etc/new", "/etc/resolv.conf"))
	}
	must(os.WriteFile("/etc/replaced", nil, 0o644))
	st, err := g.Wait()
	must(err)
	must(g.Close())
	b, err := os.ReadFile("/etc/resolv.conf")
	must(err)
	if string(b) != "nameserver 192.0.2.4\n" {
		fmt.Fprintf(os.Stderr, "the host's own file is %q\n", b)
		return 97
	}
	return st.Code
}

func listEtc(s scene) int {
	list := func() string {
		var out []string
		must(filepath.Walk("/etc", func(p string, i os.FileInfo, err error) error {
			out = append(out, fmt.Sprint(p, i.Size(), i.ModTime().UnixNano(), i.Mode()))
			return err
		}))
		return strings.Join(out, "\n")
	}
	before := list()
	code := driveOnce(s)
	if after := list(); after != before {
		fmt.Fprintf(os.Stderr, "before\n%s\nafter\n%s\n", before, after)
	}
	return code
}

func TestNothingIsWrittenToTheHostsEtc(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		for _, how := range []string{"", "link", "dangling", "absent"} {
			s := scene{UID: uid, Resolv: how, Script: "list etc", Config: baseConfig("sh", "-c", "echo changed 2>/dev/null >>/etc/hosts; true")}
			if got := play(t, s); got.code != 0 || got.stderr != "" {
				t.Errorf("%q: %+v", how, got)
			}
		}
	})
}

func TestHostsText(t *testing.T) {
	const local = "# Made by sluice for this sandbox.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
	cfg := baseConfig()
	for _, row := range []struct {
		name, hostname, callers, want string
	}{
		{"no file of the caller's: the host name is the guest's", "box", "",
			"192.0.2.9\tadded.test\n10.0.2.100\tbox\nfd00::100\tbox\n"},
		{"Debian's 127.0.1.1 works inside as it stands", "box", "127.0.1.1 box.lan box\n",
			"192.0.2.9\tadded.test\n127.0.1.1\tbox.lan box\n"},
		{"a host name on the host's own address becomes the guest's", "box", "198.51.100.7 box box.lan # main\n",
			"192.0.2.9\tadded.test\n10.0.2.100\tbox\nfd00::100\tbox\n198.51.100.7\tbox.lan\n"},
		{"an added name wins over the caller's file", "", "203.0.113.1 Added.test other.test\n",
			"192.0.2.9\tadded.test\n203.0.113.1\tother.test\n"},
		{"localhost is not given twice", "", "127.0.0.1 localhost\n::1 localhost ip6-loopback\n",
			"192.0.2.9\tadded.test\n"},
		{"comments, blanks and nonsense are left out", "", "# x\n\nnonsense\n1.2.3 a\n10.0.0.1\n10.0.0.2 b#c\n",
			"192.0.2.9\tadded.test\n10.0.0.2\tb\n"},
		{"an added entry may be the host name itself", "added.test", "",
			"192.0.2.9\tadded.test\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := string(hostsText(&cfg, row.hostname, []byte(row.callers))); got != local+row.want {
				t.Errorf("got\n%s\nwant\n%s", got, local+row.want)
			}
		})
	}
}

func TestHostsTextIsBounded(t *testing.T) {
	cfg := Config{}
	huge := strings.Repeat("10.0.0.1 name-of-a-host\n", maxHostsBytes/20)
	got := hostsText(&cfg, "", []byte(huge))
	if len(got) > maxHostsBytes+1024 || !strings.HasSuffix(string(got), "10.0.0.1\tname-of-a-host\n") {
		t.Errorf("%d bytes, ending in %q", len(got), got[len(got)-40:])
	}
}

func TestHostNamesHaveOneSource(t *testing.T) {
	for _, row := range []struct{ name, callers, want string }{
		{"nothing else", "", "hosts: files dns\n"},
		{"the line is replaced", "passwd: files sss\nhosts: resolve [!UNAVAIL=return] files dns\nservices: db\n", "hosts: files dns\npasswd: files sss\nservices: db\n"},
		{"with blanks, and twice", " hosts : mdns4\nhosts:wins\n", "hosts: files dns\n"},
		{"a comment stays", "# hosts: nis\n", "hosts: files dns\n# hosts: nis\n"},
		{"without a newline at its end", "hosts: nis", "hosts: files dns\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, got, _ := strings.Cut(string(nsswitchText([]byte(row.callers))), "\n")
			if got != row.want {
				t.Errorf("got %q, want %q", got, row.want)
			}
		})
	}
}
