package cluster

import (
	"archive/tar"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestContainerdsVersionChoosesThatOfCNI(t *testing.T) {
	for out, want := range map[string]string{
		"containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3": "1.0.0",
		"containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7193e4":          "1.1.0",
		"containerd": "",
	} {
		if got, err := cniVersionOf(out); got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", out, got, err)
		}
	}
}

func TestCertificatesAreSignedByTheCA(t *testing.T) {
	p, err := newPKI(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.certificate("apiserver", "kube-apiserver", "", "kubernetes", underlay4(1), underlay6(1)); err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(p.path("apiserver.crt"), p.path("apiserver.key"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(p.ca)
	for _, name := range []string{"kubernetes", underlay4(1), underlay6(1)} {
		if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: name}); err != nil {
			t.Errorf("for %s: %v", name, err)
		}
	}
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, DNSName: "elsewhere"}); err == nil {
		t.Error("it is good for another name")
	}
	if err := p.ca.CheckSignatureFrom(p.ca); err != nil {
		t.Errorf("the CA: %v", err)
	}
}

func TestAnImageHasWhatItsDigestsSay(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("#!\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	files := layer{{name: "bin", dir: true}, {name: "bin/program", source: program}, {name: "bin/other", link: "program"}, {name: "etc/passwd", text: "root\n"}}
	path := filepath.Join(dir, "image.tar")
	if err := files.archive(path, "images.test/x:1", "/bin/program"); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	blobs := 0
	for r := tar.NewReader(f); ; {
		header, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.New()
		if _, err := io.Copy(sum, r); err != nil {
			t.Fatal(err)
		}
		if digest, ok := strings.CutPrefix(header.Name, "blobs/sha256/"); ok {
			blobs++
			if got := fmt.Sprintf("%x", sum.Sum(nil)); got != digest {
				t.Errorf("%s has the digest %s", header.Name, got)
			}
		}
	}
	if blobs != 3 {
		t.Errorf("%d blobs, not a layer, a configuration and a manifest", blobs)
	}
}

func TestLibrariesAreReadFromLdd(t *testing.T) {
	const out = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n"
	if got := fmt.Sprint(parseLdd(out)); got != "[/lib/x86_64-linux-gnu/libc.so.6 /lib64/ld-linux-x86-64.so.2]" {
		t.Error(got)
	}
	if got := parseLdd("\tnot a dynamic executable\n"); len(got) > 0 {
		t.Errorf("of a static program: %q", got)
	}
}
