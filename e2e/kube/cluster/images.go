package cluster

// Images are made of the components and of programs of this machine, with the libraries that
// these need. Each is an OCI layout in a tar, as `ctr images import` takes it.

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
)

// Images that every node has. AgnhostImage is Kubernetes' test image, at /agnhost, beside a
// shell, awk, curl, dig, ip, nc of OpenBSD and ss.
const (
	AgnhostImage = "images.test/agnhost:1"
	corednsImage = "images.test/coredns:1"
	pauseImage   = "images.test/pause:1"
)

// machinePrograms are those of this machine that the agnhost image has beside busybox's.
var machinePrograms = []string{"bash", "dash", "curl", "dig", "ip", "ss", "getent", "nc.openbsd"}

// makeImages writes the archives into dir and returns their paths.
func makeImages(ctx context.Context, b *builder, dir string) ([]string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	agnhost, err := agnhostFiles(ctx, b.path("agnhost"))
	if err != nil {
		return nil, fmt.Errorf("collecting the agnhost image's files: %w", err)
	}
	var paths []string
	for _, image := range []struct {
		name       string
		files      layer
		entrypoint string
	}{
		{pauseImage, layer{{name: "pause", source: b.path("pid1")}}, "/pause"},
		{corednsImage, layer{{name: "coredns", source: b.path("coredns")}}, "/coredns"},
		{AgnhostImage, agnhost, "/agnhost"},
	} {
		to := filepath.Join(dir, strings.NewReplacer("/", "_", ":", "_").Replace(image.name)+".tar")
		if err := image.files.archive(to, image.name, image.entrypoint); err != nil {
			return nil, fmt.Errorf("making image %s: %w", image.name, err)
		}
		paths = append(paths, to)
	}
	return paths, nil
}

// entry is a file of an image: the content of source, text, a link, or a directory.
type entry struct {
	name   string
	source string
	text   string
	link   string
	dir    bool
}

type layer []entry

func agnhostFiles(ctx context.Context, agnhost string) (layer, error) {
	all := layer{
		{name: "tmp", dir: true}, {name: "var/tmp", dir: true}, {name: "root", dir: true}, {name: "etc", dir: true},
		{name: "etc/passwd", text: "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"},
		{name: "etc/group", text: "root:x:0:\nnogroup:x:65534:\n"},
		{name: "etc/nsswitch.conf", text: "hosts: files dns\n"},
		{name: "agnhost", source: agnhost},
	}
	// busybox prefers its own applets to programs on PATH, and its nc has no -v, -z, -u: programs
	// of this machine replace what they can.
	instead := map[string]string{"sh": "../usr/bin/dash", "nc": "../usr/bin/nc.openbsd", "bash": "../usr/bin/bash", "ip": "../usr/bin/ip"}
	for name, to := range instead {
		all = append(all, entry{name: "bin/" + name, link: to})
	}
	seen := map[string]bool{}
	for _, program := range append([]string{"busybox"}, machinePrograms...) {
		found, err := exec.LookPath(program)
		if err != nil {
			return nil, err
		}
		to := "usr/bin/" + program
		if program == "busybox" {
			to = "bin/busybox"
		}
		all = append(all, entry{name: to, source: found})
		libraries, err := librariesOf(ctx, found)
		if err != nil {
			return nil, err
		}
		for _, library := range libraries {
			if !seen[library] {
				seen[library] = true
				all = append(all, entry{name: strings.TrimPrefix(library, "/"), source: library})
			}
		}
	}
	applets, err := exec.CommandContext(ctx, "busybox", "--list").Output()
	if err != nil {
		return nil, err
	}
	for applet := range strings.FieldsSeq(string(applets)) {
		if instead[applet] == "" && applet != "busybox" {
			all = append(all, entry{name: "bin/" + applet, link: "busybox"})
		}
	}
	return all, nil
}

// librariesOf returns the shared libraries of a program, its loader included.
func librariesOf(ctx context.Context, program string) ([]string, error) {
	out, err := exec.CommandContext(ctx, "ldd", program).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "not a dynamic executable") {
		return nil, fmt.Errorf("ldd %s: %w: %s", program, err, out)
	}
	return parseLdd(string(out)), nil
}

func parseLdd(out string) []string {
	var paths []string
	for word := range strings.FieldsSeq(out) {
		// A line is "NAME => PATH (ADDRESS)" or "PATH (ADDRESS)".
		if strings.HasPrefix(word, "/") && !strings.HasSuffix(word, ":") {
			paths = append(paths, word)
		}
	}
	return paths
}

// write writes the layer as a tar. Nothing in it depends on the time.
func (l layer) write(to io.Writer) error {
	w := tar.NewWriter(to)
	for _, e := range l {
		if err := e.write(w); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
	}
	return w.Close()
}

func (e entry) write(w *tar.Writer) error {
	header := tar.Header{Typeflag: tar.TypeReg, Name: path.Clean(e.name), Mode: 0o755, Size: int64(len(e.text))}
	switch {
	case e.dir:
		header.Typeflag, header.Mode = tar.TypeDir, 0o777
		return w.WriteHeader(&header)
	case e.link != "":
		header.Typeflag, header.Linkname = tar.TypeSymlink, e.link
		return w.WriteHeader(&header)
	case e.source == "":
		if err := w.WriteHeader(&header); err != nil {
			return err
		}
		_, err := io.WriteString(w, e.text)
		return err
	}
	f, err := os.Open(e.source)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	header.Size = info.Size()
	if err := w.WriteHeader(&header); err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return err
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// archive writes an image of one layer to the file to.
func (l layer) archive(to, name, entrypoint string) (err error) {
	content, err := os.CreateTemp(filepath.Dir(to), "layer-*")
	if err != nil {
		return err
	}
	defer os.Remove(content.Name())
	defer content.Close()
	sum := sha256.New()
	if err := l.write(io.MultiWriter(content, sum)); err != nil {
		return err
	}
	size, err := content.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	if _, err := content.Seek(0, io.SeekStart); err != nil {
		return err
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	file := func(name string, size int64, from io.Reader) {
		err = errors.Join(err, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size}))
		_, copied := io.Copy(w, from)
		err = errors.Join(err, copied)
	}
	document := func(v any) string {
		text, failed := json.Marshal(v)
		err = errors.Join(err, failed)
		return string(text)
	}
	blob := func(kind string, v any) descriptor {
		text := document(v)
		digest := fmt.Sprintf("%x", sha256.Sum256([]byte(text)))
		file("blobs/sha256/"+digest, int64(len(text)), strings.NewReader(text))
		return descriptor{MediaType: "application/vnd.oci.image." + kind, Digest: "sha256:" + digest, Size: int64(len(text))}
	}
	only := descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar", Digest: fmt.Sprintf("sha256:%x", sum.Sum(nil)), Size: size}
	file("blobs/sha256/"+strings.TrimPrefix(only.Digest, "sha256:"), size, content)
	manifest := blob("manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": blob("config.v1+json", map[string]any{
			"os": "linux", "architecture": runtime.GOARCH,
			"config": map[string]any{
				"Entrypoint": []string{entrypoint},
				"Env":        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			},
			"rootfs": map[string]any{"type": "layers", "diff_ids": []string{only.Digest}},
		}),
		"layers": []descriptor{only},
	})
	manifest.Annotations = map[string]string{"io.containerd.image.name": name}
	for name, v := range map[string]any{
		"oci-layout": map[string]any{"imageLayoutVersion": "1.0.0"},
		"index.json": map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}},
	} {
		text := document(v)
		file(name, int64(len(text)), strings.NewReader(text))
	}
	return errors.Join(err, w.Close())
}

// exists reports whether there is a file.
func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
