package policy

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"go.yaml.in/yaml/v3"
)

// Reads policies from paths and descriptors. No other code reads the text of one. The text is
// bounded, and is complete or an error. Signs that it is incomplete:
//
//	a read that fails, a directory, a socket       the system's error
//	no byte, or none but space and comments        empty
//	a byte that is not UTF-8, zero, a BOM          not text (document.go)
//	more than MaxPolicyBytes                       too large; no more than that is read
//	a regular file of another size than was read,  it changed meanwhile: read anew, and
//	or that was written meanwhile                  refused if it does not come to rest
//	an end in the middle of a line                 cut, unless a bracket or quote ends it
//	a field that must be there, an open bracket    Parse
//	a pipe's end after which a cut could have      cut, unless the document ends with "..."
//	taken what narrows the policy (widestEnd)
//
// Two cuts go undetected: a file cut at the end of a line before it was opened, and a pipe whose
// writer died there, if the rest is a policy and widestEnd finds nothing in it. Flows of the lost
// rules fall to defaultAction, which denies; the last rule may have lost its ports, exceptions or
// limits. JSON and a pipe's "..." mark their own end.

// maxReads bounds how often a file that changes during a read is read again.
const maxReads = 3

// errChanged means that a file was written while it was read.
var errChanged = errors.New("it changed while it was read: write policies to a new file and rename that")

// ReadDocument reads a policy from a path; name is the document's name. Pipes are read to their
// end.
func ReadDocument(path, name string) (Document, error) {
	return readPath(path, name, os.O_RDONLY, fs.ModeNamedPipe|fs.ModeDevice|fs.ModeCharDevice)
}

// ReadDocumentFile is ReadDocument for callers who cannot wait for a writer: it accepts only a
// regular file. The path is the document's name.
func ReadDocumentFile(path string) (Document, error) {
	return readPath(path, path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
}

// ReadDocumentFrom reads a policy from an open file to its end. The caller keeps the file.
func ReadDocumentFrom(f *os.File, name string) (Document, error) {
	d, err := readFile(f, name, fs.ModeNamedPipe|fs.ModeDevice|fs.ModeCharDevice|fs.ModeSocket)
	if err != nil {
		return Document{}, readError(name, err)
	}
	return d, nil
}

func readPath(path, name string, flags int, kinds fs.FileMode) (Document, error) {
	if path == "" {
		return Document{}, errors.New("read the policy: the file's name is empty")
	}
	for n := 1; ; n++ {
		d, err := openAndRead(path, name, flags, kinds)
		switch {
		case err == nil:
			return d, nil
		case n < maxReads && errors.Is(err, errChanged):
		default:
			return Document{}, readError(path, err)
		}
	}
}

// readError leaves errors alone that already name their place.
func readError(name string, err error) error {
	var at *Error
	var path *fs.PathError
	switch {
	case errors.As(err, &at):
		return err
	case errors.As(err, &path):
		return fmt.Errorf("read the policy: %w", err)
	}
	return fmt.Errorf("read the policy: %s: %w", name, err)
}

func openAndRead(path, name string, flags int, kinds fs.FileMode) (Document, error) {
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return Document{}, err
	}
	defer f.Close()
	return readFile(f, name, kinds)
}

// readFile reads f, which is regular or of one of kinds, from its current offset to the end.
func readFile(f *os.File, name string, kinds fs.FileMode) (Document, error) {
	before, err := f.Stat()
	if err != nil {
		return Document{}, err
	}
	kind := before.Mode().Type()
	switch {
	case kind.IsDir():
		return Document{}, errors.New("it is a directory")
	case kind&^kinds != 0:
		return Document{}, errors.New("it is no regular file")
	}
	var start int64
	if kind.IsRegular() {
		if start, err = f.Seek(0, io.SeekCurrent); err != nil {
			return Document{}, err
		}
	}
	text, err := io.ReadAll(io.LimitReader(f, MaxPolicyBytes+1))
	if err != nil {
		return Document{}, err
	}
	if kind.IsRegular() && len(text) <= MaxPolicyBytes {
		after, err := f.Stat()
		if err != nil {
			return Document{}, err
		}
		if err := unchanged(before, after, start+int64(len(text))); err != nil {
			return Document{}, err
		}
	}
	d, err := NewDocument(name, text)
	if err != nil {
		return Document{}, err
	}
	if err := cutOff(text, !kind.IsRegular()); err != nil {
		line := 1 + bytes.Count(bytes.TrimRight(text, "\n"), []byte{'\n'})
		return Document{}, &Error{name, line, 1, err.Error()}
	}
	return d, nil
}

// unchanged compares a file before and after it was read up to end.
func unchanged(before, after fs.FileInfo, end int64) error {
	if after.Size() != end || stamps(before) != stamps(after) {
		return errChanged
	}
	return nil
}

// fileStamps changes whenever a file's content does, to the resolution of the kernel's clock.
type fileStamps struct {
	size         int64
	mtime, ctime syscall.Timespec
}

func stamps(fi fs.FileInfo) fileStamps {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fileStamps{size: fi.Size()}
	}
	return fileStamps{st.Size, st.Mtim, st.Ctim}
}

// cutOff returns an error if text that parses shows that something may be missing at its end.
func cutOff(text []byte, pipe bool) error {
	switch text[len(text)-1] {
	case '\n', '}', ']', '"':
	default:
		return errors.New("the file ends in the middle of a line, as one does that was cut off; expected a newline at its end")
	}
	if !pipe || ended(text) {
		return nil
	}
	if what := widestEnd(text); what != "" {
		return fmt.Errorf("the pipe's writer may have failed before its end, and %s: end the document with a line \"...\" to say that this is all", what)
	}
	return nil
}

// ended reports whether a document marks its own end: by a bracket that closes one at the very
// start, or by YAML's marker.
func ended(text []byte) bool {
	text = bytes.TrimSpace(text)
	return text[0] == '{' || bytes.HasSuffix(text, []byte("\n..."))
}

// widestEnd describes how a policy could be wider than the one before it was cut at its end, or
// returns the empty string. It looks for a default or mode that allows, which later rules may
// narrow, and for a last rule that allows every peer, which later fields may narrow.
func widestEnd(text []byte) string {
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil || len(doc.Content) == 0 {
		return "it cannot be read"
	}
	root := doc.Content[0]
	spec := valueOf(root, "spec")
	if a := valueOf(spec, "defaultAction"); a != nil && a.Value == "allow" {
		return "defaultAction allows what lost rules refuse"
	}
	if m := valueOf(spec, "mode"); m != nil && m.Value == string(Audit) {
		return "mode: audit allows everything"
	}
	if spec == nil || root.Content[len(root.Content)-1] != spec || len(spec.Content) == 0 {
		return ""
	}
	rules := spec.Content[len(spec.Content)-1]
	if rules.Kind != yaml.SequenceNode || len(rules.Content) == 0 {
		return ""
	}
	last := rules.Content[len(rules.Content)-1]
	if a := valueOf(last, "action"); a != nil && a.Value == "allow" && valueOf(last, "to") == nil && valueOf(last, "from") == nil {
		return "its last rule allows every address"
	}
	return ""
}

// valueOf returns the value of a mapping's key, or nil.
func valueOf(n *yaml.Node, key string) *yaml.Node {
	if n == nil || n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}
