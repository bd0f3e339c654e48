package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/internal/idmap"
)

func (s scene) ctx() context.Context { return context.Background() }

func TestExitStatusIsTheShells(t *testing.T) {
	dir := testutil.PublicDir(t)
	write := func(name, content string, mode os.FileMode) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	plain := write("plain", "exit 3\n", 0o755)
	locked := write("locked", "#!/bin/sh\n", 0o644)
	if err := os.MkdirAll(filepath.Join(dir, "closed", "deeper"), 0o700); err != nil {
		t.Fatal(err)
	}
	orphan := write("orphan", "#!/no/such/interpreter\n", 0o755)
	users(t, func(t *testing.T, uid int) {
		for _, row := range []struct {
			name    string
			command []string
			code    int
			stderr  string
		}{
			{"success is 0", []string{"true"}, 0, ""},
			{"a status is passed on", []string{"sh", "-c", "exit 7"}, 7, ""},
			{"255 is passed on", []string{"sh", "-c", "exit 255"}, 255, ""},
			{"125 of the command has no message of ours", []string{"sh", "-c", "exit 125"}, 125, ""},
			{"killed by SIGTERM is 143", []string{"sh", "-c", "kill -TERM $$"}, 143, ""},
			{"killed by SIGKILL is 137", []string{"sh", "-c", "kill -KILL $$"}, 137, ""},
			{"an unknown name is 127", []string{"no-such-command"}, 127, "sluice: no-such-command: command not found\n"},
			{"an unknown path is 127", []string{"/no/such/command"}, 127, "sluice: /no/such/command: no such file or directory\n"},
			{"a file that is not executable is 126", []string{locked}, 126, "sluice: " + locked + ": permission denied\n"},
			{"a directory is 126", []string{"/usr"}, 126, "sluice: /usr: permission denied\n"},
			{"a name whose only file is not executable is 126", []string{"locked"}, 126, "sluice: locked: permission denied\n"},
			{"a directory in PATH is not a command", []string{"closed"}, 127, "sluice: closed: command not found\n"},
			{"a missing interpreter is 127", []string{orphan}, 127, "sluice: " + orphan + ": its interpreter or loader does not exist\n"},
			{"a file without a magic number is a shell script", []string{plain}, 3, ""},
		} {
			for _, pidns := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, PID namespace %v", row.name, pidns), func(t *testing.T) {
					s := scene{UID: uid, Config: baseConfig(row.command...)}
					s.Config.PIDNamespace = pidns
					s.Config.Env = []string{"PATH=/nowhere:" + dir + "/closed/deeper:" + dir + ":/usr/bin:/bin"}
					got := play(t, s)
					if got.code != row.code || got.stderr != row.stderr {
						t.Errorf("status %d, stderr %q; want %d, %q", got.code, got.stderr, row.code, row.stderr)
					}
				})
			}
		}
	})
}

func TestCommandSeesItsOwnPathAndDirectory(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "only-here"), []byte("#!/bin/sh\npwd; env\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	s := scene{Config: baseConfig("only-here")}
	s.Config.Env = []string{"PATH=/nowhere:" + dir + ":/usr/bin", "A=b"}
	s.Config.Dir = dir
	got := play(t, s)
	want := dir + "\n"
	if got.code != 0 || !strings.HasPrefix(got.stdout, want) || !strings.Contains(got.stdout, "A=b\n") || strings.Contains(got.stdout, "MARK") {
		t.Errorf("%+v", got)
	}
}

func TestRootEntersADirectoryThatIsNotItsOwn(t *testing.T) {
	needRoot(t)
	dir := filepath.Join(t.TempDir(), "private")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, 1234, 1234); err != nil {
		t.Fatal(err)
	}
	s := scene{Config: baseConfig("pwd")}
	s.Config.Dir = dir
	if got := play(t, s); got.code != 0 || got.stdout != dir+"\n" {
		t.Errorf("%+v", got)
	}
}

func TestNetworkIsConfigured(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		for _, row := range []struct{ ask, want string }{
			{"ip -br link show lo", "LOOPBACK,UP"},
			{"ip -br addr show tap0", "10.0.2.100/24 fd00::100/64 fe80::"},
			{"ip -br link show tap0", "02:00:00:00:00:64"},
			{"ip link show tap0", "mtu 1500"},
			{"ip route", "default via 10.0.2.2 dev tap0"},
			{"ip -6 route", "default via fd00::2 dev tap0"},
			{"ip -6 addr show dev tap0 scope global tentative | wc -l", "0\n"},
			{"cat /proc/sys/net/ipv6/conf/tap0/accept_ra", "0\n"},
			{"cat /proc/sys/net/ipv4/ip_unprivileged_port_start", "0\n"},
			{"ls /sys/class/net | tr '\\n' ' '", "lo tap0 "},
			{"ping -c 1 -W 2 127.0.0.1 | grep -c '1 received'", "1\n"},
			{"ping -c 1 -W 2 ::1 | grep -c '1 received'", "1\n"},
			{"ls -d /sys/fs/cgroup/*/ 2>/dev/null | wc -l | grep -v '^0' | wc -l", "1\n"},
		} {
			t.Run(row.ask, func(t *testing.T) {
				out := playShell(t, scene{UID: uid, Config: baseConfig()}, row.ask)
				if !strings.Contains(strings.Join(strings.Fields(out), " "), strings.TrimSpace(row.want)) {
					t.Errorf("got %q, want %q in it", out, row.want)
				}
			})
		}
	})
}

func TestOneFamilyOnly(t *testing.T) {
	needRoot(t)
	four := baseConfig()
	four.Addr6, four.Gateway6 = Config{}.Addr6, Config{}.Gateway6
	if out := playShell(t, scene{UID: ordinary, Config: four}, "ip -6 addr show dev tap0"); out != "" {
		t.Errorf("IPv4 only, yet %s", out)
	}
	six := baseConfig()
	six.Addr4, six.Gateway4 = Config{}.Addr4, Config{}.Gateway4
	if out := playShell(t, scene{UID: ordinary, Config: six}, "ip -4 route; ip -4 addr show dev tap0"); out != "" {
		t.Errorf("IPv6 only, yet %s", out)
	}
}

func TestGatewayOutsideThePrefix(t *testing.T) {
	needRoot(t)
	c := baseConfig()
	c.Gateway4 = c.Gateway4.Next().Next().Next().Next()
	c.Addr4 = prefix("192.0.2.1/32")
	c.Addr6, c.Gateway6 = prefix("2001:db8::1/128"), addr("fe80::1")
	out := playShell(t, scene{UID: ordinary, Config: c}, "ip route; ip -6 route")
	for _, want := range []string{"default via 10.0.2.6 dev tap0 onlink", "default via fe80::1 dev tap0"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %s", want, out)
		}
	}
}

func TestWhoCommandIs(t *testing.T) {
	needRoot(t)
	const ask = "id -u; id -g; cat /proc/self/uid_map | tr -s ' '; grep -E 'CapPrm|CapEff|CapAmb|CapInh' /proc/self/status | sort; cat /proc/self/setgroups"
	// The map seen here is the inner user namespace's, which maps every id of the outer one to
	// itself.
	const none = "0000000000000000"
	all := capsOfRoot(t)
	for _, row := range []struct {
		name string
		s    scene
		mode idmap.UserMode
		subs bool
		want []string
	}{
		{"root keeps every id", scene{}, idmap.KeepCaller, false,
			[]string{"0", "0", " 0 0 4294967295", "CapAmb: " + none, "CapEff: " + all, "CapInh: " + none, "CapPrm: " + all, "allow"}},
		{"an ordinary user keeps its uid and no capability", scene{UID: ordinary}, idmap.KeepCaller, false,
			[]string{"65534", "65534", " 65534 65534 1", "CapAmb: " + none, "CapEff: " + none, "CapInh: " + none, "CapPrm: " + none, "deny"}},
		{"an ordinary user becomes root inside", scene{UID: ordinary}, idmap.MapRoot, false,
			[]string{"0", "0", " 0 0 1", "CapAmb: " + none, "CapEff: " + all, "CapInh: " + none, "CapPrm: " + all, "deny"}},
		{"subordinate ids surround the kept uid", scene{UID: ordinary, SubIDs: "65534:100000:70000\n"}, idmap.KeepCaller, true,
			[]string{"65534", "65534", " 65534 65534 1", " 0 0 65534", " 65535 65535 4466", "CapAmb: " + none, "CapEff: " + none, "CapInh: " + none, "CapPrm: " + none, "allow"}},
		{"subordinate ids follow root inside", scene{UID: ordinary, SubIDs: "nobody:100000:65536\n"}, idmap.MapRoot, true,
			[]string{"0", "0", " 0 0 1", " 1 1 65536", "CapAmb: " + none, "CapEff: " + all, "CapInh: " + none, "CapPrm: " + all, "allow"}},
		{"without a grant the one id is mapped", scene{UID: ordinary}, idmap.KeepCaller, true,
			[]string{"65534", "65534", " 65534 65534 1", "CapAmb: " + none, "CapEff: " + none, "CapInh: " + none, "CapPrm: " + none, "deny"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.s.SubIDs != "" {
				if _, err := exec.LookPath("newuidmap"); err != nil {
					t.Skip("newuidmap is not installed")
				}
			}
			row.s.Config = baseConfig()
			row.s.Config.User, row.s.Config.SubIDs = row.mode, row.subs
			out := strings.ReplaceAll(playShell(t, row.s, ask), "\t", " ")
			if want := strings.Join(row.want, "\n") + "\n"; out != want {
				t.Errorf("got\n%swant\n%s", out, want)
			}
		})
	}
}

// capsOfRoot returns every capability of this kernel: a new user namespace starts with a full
// bounding set.
func capsOfRoot(t *testing.T) string {
	b, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		t.Fatal(err)
	}
	var last uint
	if _, err := fmt.Sscan(string(b), &last); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%016x", uint64(1)<<(last+1)-1)
}

func TestOnlyTheDescriptorsMeantReachCommand(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		// Only a CMD that is root may look at the stage's descriptors too.
		const ask = "ls /proc/$$/fd; [ $(id -u) != 0 ] || ls -l /proc/$PPID/fd | grep -c '/dev/null'; cat <&3"
		s := scene{UID: uid, Config: baseConfig("sh", "-c", ask), Preserve: 1}
		cmd := s.command(t)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		fmt.Fprint(w, "passed on")
		w.Close()
		cmd.ExtraFiles = []*os.File{r, null, null, null} // 4, 5 and 6 are leaked by the caller
		out, err := cmd.Output()
		r.Close()
		want := "0\n1\n2\n3\npassed on"
		if uid == 0 {
			want = "0\n1\n2\n3\n1\npassed on" // the 1 is the stage's standard input
		}
		if err != nil || string(out) != want {
			t.Errorf("%q %v", out, err)
		}
	})
}

// hostMounts returns the mount table without mounts of namespaces. A guest never makes those, but
// tests of other packages do meanwhile.
func hostMounts() string {
	all, _ := os.ReadFile("/proc/self/mountinfo")
	var own strings.Builder
	for line := range strings.Lines(string(all)) {
		if !strings.Contains(line, " - nsfs ") {
			own.WriteString(line)
		}
	}
	return own.String()
}

func TestNothingIsLeftAfterClose(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		for _, pidns := range []bool{false, true} {
			t.Run(fmt.Sprintf("PID namespace %v", pidns), func(t *testing.T) {
				s := scene{UID: uid, Announce: true, Script: "twice", Config: baseConfig("sh", "-c", "readlink /proc/self/ns/net; setsid sleep 1000 >/dev/null 2>&1 </dev/null & unshare -Ur true; exit 0")}
				s.Config.PIDNamespace = pidns
				mounts := hostMounts()
				got := play(t, s)
				if got.code != 0 || got.stderr != "" {
					t.Fatalf("%+v", got)
				}
				for line := range strings.Lines(got.stdout) {
					if ns := strings.TrimSpace(line); strings.HasPrefix(ns, "net:") {
						if left := holders(ns); len(left) != 0 {
							t.Errorf("left over: %v", left)
						}
					}
				}
				if after := hostMounts(); after != mounts {
					t.Errorf("the host's mounts changed:\n%s\nafterwards:\n%s", mounts, after)
				}
			})
		}
	})
}

func TestNothingOutlivesAKilledMonitor(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		for _, pidns := range []bool{false, true} {
			t.Run(fmt.Sprintf("PID namespace %v", pidns), func(t *testing.T) {
				s := scene{UID: uid, Config: baseConfig("sh", "-c", "setsid setsid sleep 1000 & readlink /proc/self/ns/net; sleep 1000")}
				s.Config.PIDNamespace = pidns
				cmd := s.command(t)
				r, done := launchReading(t, cmd)
				ns, err := r.ReadString('\n')
				if err != nil {
					t.Fatal(err)
				}
				ns = strings.TrimSpace(ns)
				testutil.Eventually(t, "all four are in", func() bool { return len(holders(ns)) == 4 })
				if err := cmd.Process.Signal(unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				<-done
				testutil.Eventually(t, "all of them are gone", func() bool { return len(holders(ns)) == 0 })
			})
		}
	})
}

func TestAStageThatWasKilledIsToldAndClearedUp(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		s := scene{UID: uid, Announce: true, Config: baseConfig("sh", "-c", "readlink /proc/self/ns/net; setsid sleep 1000 & sleep 1000")}
		cmd := s.command(t)
		var errs strings.Builder
		cmd.Stderr = &errs
		r, done := launchReading(t, cmd)
		var stage int
		if _, err := fmt.Fscanf(r, "stage %d\n", &stage); err != nil {
			t.Fatal(err)
		}
		ns, err := r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Kill(stage, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-done
		if cmd.ProcessState.ExitCode() != StatusOurs || !strings.Contains(errs.String(), "signal: killed") {
			t.Errorf("status %d: %s", cmd.ProcessState.ExitCode(), errs.String())
		}
		if left := holders(strings.TrimSpace(ns)); len(left) != 0 {
			t.Errorf("left over: %v", left)
		}
	})
}

func TestSignalsAreForwarded(t *testing.T) {
	needRoot(t)
	for _, sig := range []syscall.Signal{unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2, unix.SIGINT, unix.SIGQUIT} {
		t.Run(sig.String(), func(t *testing.T) {
			// The children of this process do not ignore a signal that it handles, as they would
			// under nohup.
			handled := make(chan os.Signal, 1)
			signal.Notify(handled, sig)
			defer signal.Stop(handled)
			script := fmt.Sprintf("trap 'echo got; exit 9' %d; echo ready; while :; do sleep 0.02; done", int(sig))
			s := scene{UID: ordinary, Relay: true, Config: baseConfig("sh", "-c", script)}
			cmd := s.command(t)
			cmd.SysProcAttr.Setsid = true // no terminal: only we could have sent it
			r, done := launchReading(t, cmd)
			if line, err := r.ReadString('\n'); line != "ready\n" {
				t.Fatal(line, err)
			}
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			line, _ := r.ReadString('\n')
			<-done
			if line != "got\n" || cmd.ProcessState.ExitCode() != 9 {
				t.Errorf("%q, status %d", line, cmd.ProcessState.ExitCode())
			}
		})
	}
}

func TestPIDNamespaceHasAnInitThatReaps(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		s := scene{UID: uid, Config: baseConfig()}
		s.Config.PIDNamespace = true
		// The orphan's pid must vanish, which takes an init that reaps it.
		out := playShell(t, s, `cat /proc/1/cmdline | tr '\0' ' '; echo; sh -c 'sh -c "exit 0" & echo $!' >/tmp/sluice-orphan.$$; p=$(cat /tmp/sluice-orphan.$$); rm /tmp/sluice-orphan.$$; i=0; while [ -d /proc/$p ] && [ $i -lt 500 ]; do sleep 0.01; i=$((i+1)); done; [ -d /proc/$p ] && echo zombie || echo collected; ls -d /proc/[0-9]* | wc -l`)
		lines := strings.Split(out, "\n")
		if len(lines) < 3 || lines[0] != "sluice guest inner " || lines[1] != "collected" {
			t.Errorf("%q", out)
		}
	})
}

func TestHiddenDirectoriesAreEmpty(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		dir := testutil.PublicDir(t)
		testutil.Must(t, os.Chmod(dir, 0o777))
		if err := os.WriteFile(filepath.Join(dir, "secret"), nil, 0o666); err != nil {
			t.Fatal(err)
		}
		s := scene{UID: uid, Config: baseConfig()}
		s.Config.HideDirs = []string{dir, "/no/such/dir"}
		out := playShell(t, s, "ls -A "+dir+"; touch "+dir+"/x 2>&1 | grep -c Read-only")
		if out != "1\n" {
			t.Errorf("%q", out)
		}
		s.Config.Dir = dir
		if out := playShell(t, s, "ls -A; pwd"); out != dir+"\n" {
			t.Errorf("as the working directory: %q", out)
		}
	})
}

// ignoredSignals returns the signals that this process ignores.
func ignoredSignals(t *testing.T) (mask uint64) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "SigIgn:")
	if _, err := fmt.Sscanf(rest, "%x", &mask); err != nil {
		t.Fatal(err)
	}
	return mask
}

func TestLimitsUmaskAndIgnoredSignalsAreTheCallers(t *testing.T) {
	users(t, func(t *testing.T, uid int) {
		out := playShell(t, scene{UID: uid, Nohup: true, Relay: true, Config: baseConfig()},
			"ulimit -Sn; umask; grep SigIgn /proc/self/status | cut -f 2; grep SigBlk /proc/self/status | cut -f 2")
		// Signals that the tests were started with ignored, such as SIGINT and SIGQUIT of a
		// background job, are passed on too.
		var limit, umask string
		var ignored, blocked uint64
		if _, err := fmt.Sscanf(out, "%s\n%s\n%x\n%x\n", &limit, &umask, &ignored, &blocked); err != nil {
			t.Fatalf("got %q: %v", out, err)
		}
		const hup, intQuit = 1, 6 // the runtime does not leave the latter ignored in this process
		if ours := ignoredSignals(t); limit != "777" || umask != "0027" || ignored&^(ours|intQuit)|hup != hup || ignored&hup == 0 || blocked != 0 {
			t.Errorf("got %q, want a limit of 777, umask 0027, SIGHUP ignored and what is ignored here (%x), nothing blocked", out, ours)
		}
	})
}
