package sandbox

import (
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"sluice.dev/sluice/internal/testutil"
	"sluice.dev/sluice/sandbox/internal/host"
)

func TestTheHostsSocketsAreFound(t *testing.T) {
	dir := testutil.ShortDir(t)
	sockets := map[string]string{}
	for _, name := range []string{"plain", "with blank", "a/deep", "a/b/deeper"} {
		path := filepath.Join(dir, name)
		testutil.Must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		l, err := net.Listen("unix", path)
		testutil.Must(t, err)
		t.Cleanup(func() { l.Close() })
		sockets[name] = path
	}
	testutil.Must(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))

	list := filepath.Join(dir, "list")
	const head = "Num       RefCount Protocol Flags    Type St Inode Path\n"
	const entry = "0000000000000000: 00000002 00000000 00010000 0001 01 12345"
	testutil.Must(t, os.WriteFile(list, []byte(head+
		entry+" "+sockets["plain"]+"\n"+entry+" "+sockets["with blank"]+"\n"+
		entry+"\n"+entry+" @"+sockets["plain"]+"\n"+entry+" relative/path\n"+
		entry+" "+filepath.Join(dir, "file")+"\n"+entry+" "+filepath.Join(dir, "gone")+"\n"), 0o600))
	got, err := host.ListedSockets(list)
	testutil.Must(t, err)
	if want := []string{sockets["plain"], sockets["with blank"]}; !reflect.DeepEqual(got, want) {
		t.Errorf("the list has %q, want %q", got, want)
	}

	found := strings.Join(host.SocketsIn(dir, 1), "\n")
	for name, want := range map[string]bool{"plain": true, "with blank": true, "a/deep": true, "a/b/deeper": false} {
		if strings.Contains(found+"\n", sockets[name]+"\n") != want {
			t.Errorf("one level below %s: %s is found: %v", dir, name, !want)
		}
	}

	for _, row := range []struct{ env, want string }{
		{"SSH_AUTH_SOCK=" + sockets["plain"], sockets["plain"]},
		{"DOCKER_HOST=unix://" + sockets["a/deep"], sockets["a/deep"]},
		{"DBUS_SESSION_BUS_ADDRESS=unix:path=" + sockets["plain"] + ",guid=1", sockets["plain"]},
		{"TMUX=" + sockets["plain"] + ",123,0", sockets["plain"]},
		{"PATH=/bin:" + dir, ""},
		{"NOTHING=" + filepath.Join(dir, "file"), ""},
	} {
		if got := strings.Join(host.SocketsNamed([]string{row.env}), " "); got != row.want {
			t.Errorf("%s names %q, want %q", row.env, got, row.want)
		}
	}
}
