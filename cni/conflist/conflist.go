package conflist

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// A conflist is edited in place: unknown keys and plugins keep their text and order. The file is
// replaced in one step, because runtimes read it as soon as it changes.

// PluginType is the binary's name, by which runtimes find it.
const PluginType = "sluice-cni"

// The capabilities that an installed plugin declares. dns gives the pod's resolvers. Bandwidth is
// for the plugin of that name where the list has it.
const (
	bandwidthPlugin = "bandwidth"
	ourCapabilities = `{"cgroupPath": true, "dns": true, "io.kubernetes.cri.pod-annotations": true}`
	andBandwidth    = `{"bandwidth": true, "cgroupPath": true, "dns": true, "io.kubernetes.cri.pod-annotations": true}`
)

// Add adds our plugin, with further keys of its configuration, to the end of a conflist. check
// validates the plugin's configuration as a runtime would pass it.
func Add(path string, keys []byte, check func(json.RawMessage) error) error {
	return editConflist(path, func(l *list) error { return l.add(keys, check) })
}

// Remove removes our plugin from a conflist, if it is there.
func Remove(path string) error {
	return editConflist(path, func(l *list) error {
		if !slices.ContainsFunc(l.plugins, isOurs) {
			return errUnchanged
		}
		l.remove()
		return nil
	})
}

// list is a conflist's object: names in their order, and plugins separately.
type list struct {
	object  object
	plugins []json.RawMessage
}

// object is a JSON object that keeps the order of its keys.
type object []member

type member struct {
	key   string
	value json.RawMessage
}

func (l *list) add(keys []byte, check func(json.RawMessage) error) error {
	capabilities := andBandwidth
	if slices.ContainsFunc(l.plugins, func(p json.RawMessage) bool { return marksOf(p).Type == bandwidthPlugin }) {
		capabilities = ourCapabilities
	}
	own, err := ownPlugin(keys, capabilities, check)
	if err != nil {
		return err
	}
	if len(keys) == 0 && slices.ContainsFunc(l.plugins, isOurs) {
		return errUnchanged
	}
	if len(l.plugins) == 0 {
		return errors.New("the list has no plugin: sluice comes after a main plugin (or alone, with `delegate`, in a list of your own)")
	}
	l.remove()
	if off, _ := l.object.get("disableCheck"); string(off) != "true" {
		// Plugins before us look in the container for the interface that we have moved.
		l.object.set("disableCheck", json.RawMessage("true"))
		own.set("setDisableCheck", json.RawMessage("true"))
	}
	l.plugins = append(l.plugins, own.encode())
	return nil
}

// ownPlugin is our own entry.
func ownPlugin(keys []byte, capabilities string, check func(json.RawMessage) error) (object, error) {
	own := object{
		{"type", json.RawMessage(`"` + PluginType + `"`)},
		{"capabilities", json.RawMessage(capabilities)},
	}
	if len(bytes.TrimSpace(keys)) > 0 {
		extra, err := decodeObject(keys)
		if err != nil {
			return nil, fmt.Errorf("the plugin's own configuration: %w", err)
		}
		for _, m := range extra {
			if m.key == "type" || m.key == "name" || m.key == "cniVersion" {
				return nil, fmt.Errorf("the plugin's own configuration: the key %q is the list's", m.key)
			}
			own.set(m.key, m.value)
		}
	}
	// An error that the runtime would get later is reported now.
	whole := append(slices.Clone(own), member{"name", json.RawMessage(`"check"`)}, member{"cniVersion", json.RawMessage(`"1.0.0"`)})
	if err := check(whole.encode()); err != nil {
		return nil, err
	}
	return own, nil
}

// ourMarks identify our plugin's entry for install.
type ourMarks struct {
	Type            string `json:"type"`
	SetDisableCheck bool   `json:"setDisableCheck"`
}

func marksOf(plugin json.RawMessage) (m ourMarks) {
	if json.Unmarshal(plugin, &m) != nil {
		return ourMarks{}
	}
	return m
}

func isOurs(plugin json.RawMessage) bool { return marksOf(plugin).Type == PluginType }

func (l *list) remove() {
	l.plugins = slices.DeleteFunc(l.plugins, func(p json.RawMessage) bool {
		if !isOurs(p) {
			return false
		}
		if marksOf(p).SetDisableCheck {
			l.object = slices.DeleteFunc(l.object, func(m member) bool { return m.key == "disableCheck" })
		}
		return true
	})
}

// errUnchanged ends an edit that has nothing to do.
var errUnchanged = errors.New("nothing to change")

func editConflist(path string, edit func(*list) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%s: %w", path, err)
		}
	}()
	// A symbolic link stays: its target is replaced.
	path, err = filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	l := &list{}
	if l.object, err = decodeObject(old); err != nil {
		return fmt.Errorf("not a network configuration list: %w", err)
	}
	raw, ok := l.object.get("plugins")
	if !ok {
		return errors.New("not a network configuration list: it has no plugins (a single .conf must be made a .conflist first)")
	}
	if err := json.Unmarshal(raw, &l.plugins); err != nil {
		return fmt.Errorf("its plugins: %w", err)
	}
	if err := edit(l); errors.Is(err, errUnchanged) {
		return nil
	} else if err != nil {
		return err
	}
	plugins, err := json.Marshal(l.plugins)
	if err != nil {
		return err
	}
	l.object.set("plugins", plugins)
	var out bytes.Buffer
	if err := json.Indent(&out, l.object.encode(), "", "  "); err != nil {
		return err
	}
	out.WriteByte('\n')
	if bytes.Equal(out.Bytes(), old) {
		return nil
	}
	return ReplaceFile(path, &out, fi)
}

// ReplaceFile replaces the content of a file, keeping its mode and owner.
func ReplaceFile(path string, content io.Reader, like fs.FileInfo) (err error) {
	// Not *.conflist, *.conf or *.json: the runtime must not read it.
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".sluice-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp.Name())
		}
	}()
	_, err = io.Copy(tmp, content)
	if err == nil {
		err = tmp.Chmod(like.Mode().Perm())
	}
	if st, ok := like.Sys().(*syscall.Stat_t); ok && err == nil {
		err = tmp.Chown(int(st.Uid), int(st.Gid))
	}
	if err == nil {
		err = tmp.Sync()
	}
	if err = errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

func decodeObject(b []byte) (object, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	t, err := d.Token()
	if err != nil {
		return nil, err
	}
	if t != json.Delim('{') {
		return nil, fmt.Errorf("want a JSON object, not %v", t)
	}
	var o object
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, err
		}
		var m member
		m.key, _ = t.(string)
		if err := d.Decode(&m.value); err != nil {
			return nil, err
		}
		o = append(o, m)
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the JSON object")
	}
	return o, nil
}

func (o object) get(key string) (json.RawMessage, bool) {
	for _, m := range o {
		if m.key == key {
			return m.value, true
		}
	}
	return nil, false
}

func (o *object) set(key string, value json.RawMessage) {
	for i := range *o {
		if (*o)[i].key == key {
			(*o)[i].value = value
			return
		}
	}
	*o = append(*o, member{key, value})
}

func (o object) encode() json.RawMessage {
	out := []byte{'{'}
	for i, m := range o {
		if i > 0 {
			out = append(out, ',')
		}
		key, _ := json.Marshal(m.key) // a string always encodes
		out = append(append(append(out, key...), ':'), m.value...)
	}
	return append(out, '}')
}
