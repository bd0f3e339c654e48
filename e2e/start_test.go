package e2e

// Starting on a busy host, where other programs have used up resources or change them while they
// are read.

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// withoutInotify starts a command in a user namespace whose users may have no inotify instance, as
// on a machine where other programs hold all of them.
func (n *netns) withoutInotify(t *testing.T, script string, args ...string) *proc {
	t.Helper()
	cmd := exec.Command("sh", append([]string{"-ec", "echo 0 > /proc/sys/user/max_inotify_instances\n" + script, "sh"}, args...)...)
	all := []syscall.SysProcIDMap{{Size: 1 << 16}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid: true, Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: all, GidMappings: all, GidMappingsEnableSetgroups: true,
	}
	return n.startCmd(t, n.plain, cmd)
}

func TestInotifyThatIsUsedUpIsDoneWithout(t *testing.T) {
	area(t, "start.inotify", "unshare", "nsenter", "dig")
	asRoot(t, "the limit is set for a user namespace with more than one user")
	t.Run("a sandbox follows the host's resolver", func(t *testing.T) {
		w := newPair(t)
		w.nameServer(t, "first", far4)
		w.nameServer(t, "second", other4)
		p := w.host.withoutInotify(t, `exec "$@"`, sluiceBin(), "run", "--quiet", "--", "sh", "-c",
			"while read tag; do until dig +short +time=1 +tries=1 tag.test TXT | grep $tag; do :; done; done")
		p.write([]byte("first\n"))
		p.waitText(t, "first", 10*time.Second)
		conf := filepath.Join(w.host.dir, "etc/resolv.conf")
		if err := os.WriteFile(conf, []byte("nameserver "+other4+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		p.write([]byte("second\n"))
		p.waitText(t, "second", 5*time.Second)
		p.closeInput()
		if r := p.wait(t, 10*time.Second).wantStatus(t, 0); r.err != "" {
			t.Errorf("it says\n%s", r)
		}
	})
	t.Run("an attachment ends with the namespace at its path", func(t *testing.T) {
		w := newPair(t)
		serve(t, w.far)
		path := filepath.Join(w.host.dir, "box")
		p := w.host.withoutInotify(t, `
			touch $1
			unshare --net=$1 true
			$2 attach --netns $1 --ready-fd 3 3>$1.ready & pid=$!
			until [ -s $1.ready ] || ! kill -0 $pid; do sleep 0.05; done
			nsenter --net=$1 $3 dial $4
			umount $1
			rm $1
			wait $pid`, path, sluiceBin(), peerBin(), at(far4, portWhoami))
		p.waitText(t, `"got":"`+pair4, 10*time.Second)
		if r := p.wait(t, 10*time.Second).wantStatus(t, 0); r.err != "" {
			t.Errorf("it says\n%s", r)
		}
	})
}

// TestTheHostsTablesMayChangeWhileTheyAreRead starts sandboxes while links come and go, so that the
// kernel interrupts the reading of its tables (NLM_F_DUMP_INTR).
func TestTheHostsTablesMayChangeWhileTheyAreRead(t *testing.T) {
	area(t, "start.churn", "ip")
	w := newPair(t)
	var links strings.Builder
	for i := range 10 {
		fmt.Fprintf(&links, "link add churn%d type bridge\nlink set churn%d up\naddr add 203.0.113.%d/32 dev churn%d\n", i, i, i, i)
	}
	for i := range 10 {
		fmt.Fprintf(&links, "link del churn%d\n", i)
	}
	batch := write(t, "links", links.String())
	churn := w.host.start(t, "sh", "-c", "while ip -batch "+batch+"; do echo round; done")
	churn.waitText(t, "round", 10*time.Second)
	for range 5 {
		var starts []*proc
		for range 4 {
			starts = append(starts, w.host.sluice(t, "run", "--quiet", "--", "true"))
		}
		for _, p := range starts {
			if r := p.wait(t, 30*time.Second).wantStatus(t, 0); r.err != "" {
				t.Errorf("it says\n%s", r)
			}
		}
	}
	if r := churn.result(""); r.status != -1 {
		t.Errorf("the links stand still\n%s", r)
	}
}
