package e2e

// The image of the containerd tests: an OCI layout in a tar, with one layer, as `ctr images import`
// takes it. It needs no registry.

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

type ociDescriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// ociArchive returns the path of an image called name, with the peer as its only file and a command
// line.
func ociArchive(t *testing.T, name string, command ...string) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "image.tar")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	file := func(name string, content []byte) {
		err = errors.Join(err, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))}))
		_, written := w.Write(content)
		err = errors.Join(err, written)
	}
	blob := func(kind string, content []byte) ociDescriptor {
		sum := fmt.Sprintf("%x", sha256.Sum256(content))
		file("blobs/sha256/"+sum, content)
		return ociDescriptor{MediaType: "application/vnd.oci.image." + kind, Digest: "sha256:" + sum, Size: len(content)}
	}
	text := func(v any) []byte {
		b, failed := json.Marshal(v)
		err = errors.Join(err, failed)
		return b
	}
	layer := blob("layer.v1.tar", rootfs(t))
	config := blob("config.v1+json", text(map[string]any{
		"os": "linux", "architecture": runtime.GOARCH,
		"config": map[string]any{"Entrypoint": command},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{layer.Digest}},
	}))
	manifest := blob("manifest.v1+json", text(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": config, "layers": []ociDescriptor{layer},
	}))
	manifest.Annotations = map[string]string{"io.containerd.image.name": name}
	file("oci-layout", text(map[string]any{"imageLayoutVersion": "1.0.0"}))
	file("index.json", text(map[string]any{"schemaVersion": 2, "manifests": []ociDescriptor{manifest}}))
	if err := errors.Join(err, w.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}
