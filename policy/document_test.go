package policy

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const wholePolicy = `apiVersion: sluice.dev/v1alpha1
kind: SandboxPolicy
metadata:
  name: whole
spec:
  defaultAction: reject
  egress:
  - name: web
    action: allow
    to: [{cidr: 192.0.2.0/24}]
    ports: [{protocol: TCP, port: 443}]
`

// unreadable are texts that are no policy, by what is said of them.
var unreadable = []struct{ name, text, want string }{
	{"no byte", "", "empty"},
	{"white space", " \n\t\r\n", "empty"},
	{"comments", "# a\n# b\n", "empty"},
	{"a marker", "---\n", "expected a mapping"},
	{"two markers", "---\n---\n", "expected a mapping"},
	{"an end marker", "...\n", ""},
	{"null", "null\n", "expected a mapping"},
	{"a tilde", "~\n", "expected a mapping"},
	{"an empty mapping", "{}\n", "lacks apiVersion"},
	{"a list", "[]\n", "expected a mapping"},
	{"a scalar", "deny\n", "expected a mapping"},
	{"no spec", strings.SplitAfter(wholePolicy, "name: whole\n")[0], "lacks spec"},
	{"a spec of nothing", strings.SplitAfter(wholePolicy, "spec:\n")[0], "expected a mapping"},
	{"cut in a word", strings.SplitAfter(wholePolicy, "act")[0], "invalid YAML"},
	{"not UTF-8", wholePolicy + "# caf\xe9\n", ":12:6: a byte that is not UTF-8 (0xe9)"},
	{"the replacement character", wholePolicy + "# \ufffd\n", "U+FFFD"},
	{"UTF-16, little-endian", utf16(wholePolicy, true, true), "not UTF-8"},
	{"UTF-16, big-endian", utf16(wholePolicy, false, true), "not UTF-8"},
	{"UTF-16 without a mark", utf16(wholePolicy, true, false), "zero byte"},
	{"a zero byte", wholePolicy + "\x00", "zero byte"},
	{"a zero byte in a comment", "# \x00\n" + wholePolicy, ":1:3: a zero byte"},
	{"a byte order mark", "\ufeff" + wholePolicy, "byte order mark"},
	{"a byte order mark further down", "# a\n\ufeff" + wholePolicy, "byte order mark"},
	{"a second document", wholePolicy + "---\n" + wholePolicy, "second YAML document"},
	{"a second document of nothing", wholePolicy + "---\n", "second YAML document"},
	{"nothing before the document", "---\n---\n" + wholePolicy, "expected a mapping"},
	{"too large", wholePolicy + strings.Repeat("#\n", MaxPolicyBytes/2), "expected at most"},
}

func utf16(s string, little, mark bool) string {
	var b strings.Builder
	if mark {
		s = "\ufeff" + s
	}
	for _, r := range s {
		if pair := [2]byte{byte(r >> 8), byte(r)}; little {
			b.Write([]byte{pair[1], pair[0]})
		} else {
			b.Write(pair[:])
		}
	}
	return b.String()
}

// pipe is the read end of a pipe into which text was written, and whose writer has ended.
func pipe(t *testing.T, text string) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	// Ends when the text is read, or with the read end.
	go func() {
		_, _ = io.WriteString(w, text)
		_ = w.Close()
	}()
	return r
}

func TestAPolicyThatIsNotWholeIsNoDocument(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range unreadable {
		path := filepath.Join(dir, "p.yaml")
		if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		in, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		for how, read := range map[string]func() (Document, error){
			"as a string":       func() (Document, error) { return NewDocument("p.yaml", []byte(tt.text)) },
			"from a file":       func() (Document, error) { return ReadDocument(path, "p.yaml") },
			"from only a file":  func() (Document, error) { return ReadDocumentFile(path) },
			"from an open file": func() (Document, error) { return ReadDocumentFrom(in, "p.yaml") },
			"from a pipe":       func() (Document, error) { return ReadDocumentFrom(pipe(t, tt.text), "p.yaml") },
		} {
			if d, err := read(); err == nil || d != (Document{}) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s %s: %v, %v; want %q", tt.name, how, d.name, err, tt.want)
			}
		}
	}
}

func TestAWholePolicyIsRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p.yaml")
	for name, text := range map[string]string{
		"YAML": wholePolicy, "YAML with its markers": "---\n" + wholePolicy + "...\n", "CRLF": strings.ReplaceAll(wholePolicy, "\n", "\r\n"),
		"JSON without a newline": `{"apiVersion": "sluice.dev/v1alpha1", "kind": "SandboxPolicy", "metadata": {"name": "a"}, "spec": {"defaultAction": "allow"}}`,
		"as large as can be":     wholePolicy + strings.Repeat("#", MaxPolicyBytes-len(wholePolicy)-1) + "\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for how, read := range map[string]func() (Document, error){
			"a file": func() (Document, error) { return ReadDocument(path, "p") }, "only a file": func() (Document, error) { return ReadDocumentFile(path) },
			"a pipe": func() (Document, error) { return ReadDocumentFrom(pipe(t, text), "p") },
		} {
			if d, err := read(); err != nil || d.Text() != text {
				t.Errorf("%s from %s: %v", name, how, err)
			}
		}
	}
}

// What can be said of a document that was cut, at every byte: it is an error, or, at the end of
// a line, allows nothing that the whole does not. (What may be lost at the end of a line is
// in read.go.)
func TestAPolicyCutAtAnyByteIsNoWiderOne(t *testing.T) {
	p, err := Parse("whole", []byte(wholePolicy))
	if err != nil {
		t.Fatal(err)
	}
	whole := mustCompile(t, p, here)
	queries := []Query{tcpTo("1.1.1.1:443"), tcpTo("192.0.2.7:443"), tcpTo("10.1.1.1:443"), tcpTo("192.168.1.5:22")}
	accepted := 0
	for n := range len(wholePolicy) {
		d, err := ReadDocumentFrom(pipe(t, wholePolicy[:n]), "cut")
		if err != nil {
			continue
		}
		accepted++
		p, err := d.Policy()
		if err != nil {
			t.Fatal(err)
		}
		rules := mustCompile(t, p, here)
		for _, q := range queries {
			if rules.Decide(q).Allowed() && !whole.Decide(q).Allowed() {
				t.Errorf("cut after %d bytes it allows %v:\n%s", n, q.Dst, wholePolicy[:n])
			}
		}
	}
	if accepted == 0 {
		t.Error("no cut is a policy: the test compares nothing")
	}
}

func TestAPipeThatMayHaveBeenCutMustSayWhereItEnds(t *testing.T) {
	head := strings.SplitAfter(wholePolicy, "spec:\n")[0]
	for _, tt := range []struct {
		name, spec string
		ok         bool
	}{
		{"a rule with peers last", "  egress:\n  - action: allow\n    to: [{cidr: 192.0.2.0/24}]\n", true},
		{"a rule without peers, and peers may have followed", "  egress:\n  - action: allow\n", false},
		{"the same of ingress", "  ingress:\n  - action: allow\n    ports: [{protocol: TCP, port: 80}]\n", false},
		{"such a rule before another", "  egress:\n  - action: allow\n    ports: [{protocol: TCP, port: 80}]\n  - action: reject\n", true},
		{"such a rule before another field", "  egress:\n  - action: allow\n  defaultAction: reject\n", true},
		{"a default that allows, and rules may have followed", "  defaultAction: allow\n", false},
		{"the same with rules that refuse", "  defaultAction: allow\n  egress:\n  - action: reject\n    to: [{cidr: 192.0.2.0/24}]\n", false},
		{"audit", "  mode: audit\n  egress:\n  - action: allow\n    to: [{domain: example.com}]\n", false},
		{"nothing allowed", "  defaultAction: drop\n", true},
	} {
		_, err := ReadDocumentFrom(pipe(t, head+tt.spec), "p")
		if (err == nil) != tt.ok || err != nil && !strings.Contains(err.Error(), `"..."`) {
			t.Errorf("%s: %v", tt.name, err)
		}
		if _, err := ReadDocumentFrom(pipe(t, head+tt.spec+"...\n"), "p"); err != nil {
			t.Errorf("%s, with an end: %v", tt.name, err)
		}
		path := filepath.Join(t.TempDir(), "p")
		if err := os.WriteFile(path, []byte(head+tt.spec), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadDocument(path, "p"); err != nil {
			t.Errorf("%s, from a file: %v", tt.name, err)
		}
	}
}

func TestAnEndInTheMiddleOfALineIsACut(t *testing.T) {
	for _, text := range []string{wholePolicy + "# and", strings.TrimSuffix(wholePolicy, "  egress:"+strings.SplitAfter(wholePolicy, "  egress:")[1]) + "  mode: enforce"} {
		if _, err := ReadDocumentFrom(pipe(t, text), "p.yaml"); err == nil || !strings.Contains(err.Error(), "the middle of a line") {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestWhatIsNoFileIsNoDocument(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	closed, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	_ = closed.Close()
	for name, read := range map[string]func() (Document, error){
		"a directory":             func() (Document, error) { return ReadDocument(dir, "p") },
		"a path of no name":       func() (Document, error) { return ReadDocument("", "p") },
		"a file of no name":       func() (Document, error) { return ReadDocumentFile("") },
		"a file that is missing":  func() (Document, error) { return ReadDocument(dir+"/none", "p") },
		"a link to nowhere":       func() (Document, error) { return ReadDocumentFile(dir + "/link") },
		"a pipe where only files": func() (Document, error) { return ReadDocumentFile(dir + "/fifo") },
		"a device of no end":      func() (Document, error) { return ReadDocument("/dev/zero", "p") },
		"a device of nothing":     func() (Document, error) { return ReadDocument("/dev/null", "p") },
		"a descriptor that is not open": func() (Document, error) {
			return ReadDocumentFrom(closed, "p")
		},
	} {
		if d, err := read(); err == nil || d != (Document{}) {
			t.Errorf("%s: %v, %v", name, d, err)
		}
	}
}

// A file whose content changes under the reader is never half of one and half of the other.
func TestAFileThatChangesWhileItIsReadIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "p.yaml")
	if err := os.WriteFile(path, []byte(wholePolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(f *os.File) error{
		"it grows":    func(f *os.File) error { _, err := f.WriteAt([]byte("#\n"), int64(len(wholePolicy))); return err },
		"it shrinks":  func(f *os.File) error { return f.Truncate(5) },
		"its size is": func(f *os.File) error { _, err := f.WriteAt([]byte("#"), 0); return err },
	} {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		// Long ago, so that the kernel's clock has ticked since.
		if err := os.Chtimes(path, time.Unix(1, 0), time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		before, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if err := change(f); err != nil {
			t.Fatal(err)
		}
		after, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if err := unchanged(before, after, before.Size()); !errors.Is(err, errChanged) {
			t.Errorf("%s: %v", name, err)
		}
		if err := unchanged(after, after, after.Size()); err != nil {
			t.Errorf("%s, and came to rest: %v", name, err)
		}
		_ = f.Close()
	}
	if err := unchanged(mustStat(t, path), mustStat(t, path), 3); !errors.Is(err, errChanged) {
		t.Errorf("less was read than there is: %v", err)
	}
}

func mustStat(t *testing.T, path string) os.FileInfo {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi
}

func TestASourceIsADocumentOrNone(t *testing.T) {
	d, err := NewDocument("p.yaml", []byte(wholePolicy))
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]Source{
		"p.yaml": Given(d), "default": NotGiven(Builtin{AllowHost: true}),
	} {
		b, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var back Source
		if err := json.Unmarshal(b, &back); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		doc, given := back.Document()
		builtin, none := back.Builtin()
		if given == none || given && doc != d || none && builtin != (Builtin{AllowHost: true}) || back.Name() != name {
			t.Errorf("%s came back as %+v", b, back)
		}
		text, err := back.Text()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse("text", []byte(text)); err != nil {
			t.Errorf("%s prints as no policy: %v", b, err)
		}
	}
	var zero Source
	if _, err := zero.Policy(); !errors.Is(err, ErrNoSource) {
		t.Errorf("the zero source has a policy: %v", err)
	}
	if _, err := Given(Document{}).Policy(); !errors.Is(err, ErrNoSource) {
		t.Errorf("a zero document has a policy: %v", err)
	}
	for _, v := range []any{zero, Document{}, Given(Document{})} {
		if b, err := json.Marshal(v); err == nil {
			t.Errorf("%#v is sent as %s", v, b)
		}
	}
}

// FuzzDocument: whatever bytes come, what is taken for a document parses, and comes back from
// JSON as it was.
func FuzzDocument(f *testing.F) {
	for _, tt := range unreadable {
		if len(tt.text) < 4096 {
			f.Add([]byte(tt.text))
		}
	}
	f.Add([]byte(wholePolicy))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := NewDocument("f", text)
		if err != nil {
			return
		}
		_ = cutOff(text, true)
		b, err := json.Marshal(Given(d))
		if err != nil {
			t.Fatal(err)
		}
		var back Source
		if err := json.Unmarshal(b, &back); err != nil {
			t.Fatal(err)
		}
		if got, given := back.Document(); !given || got != d {
			t.Fatalf("came back as %+v", got)
		}
		if _, err := back.Policy(); err != nil {
			t.Fatal(err)
		}
	})
}
