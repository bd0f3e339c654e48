package cluster

// Certificates are new with each cluster: one CA, and a key pair for each component.

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

type pki struct {
	dir string
	ca  *x509.Certificate
	key crypto.Signer
}

// newPKI makes the CA, and the key that signs service accounts' tokens.
func newPKI(dir string) (*pki, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	p := &pki{dir: dir}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "kube-ca"},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
	}
	var err error
	p.ca = template
	if p.ca, p.key, err = p.issue("ca", template); err != nil {
		return nil, err
	}
	key, err := p.newKey("sa")
	if err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, err
	}
	return p, writePEM(p.path("sa.pub"), "PUBLIC KEY", public)
}

func (p *pki) path(name string) string { return filepath.Join(p.dir, name) }

func (p *pki) newKey(name string) (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, writePEM(p.path(name+".key"), "EC PRIVATE KEY", der)
}

// issue completes a certificate, signs it with the CA, or with its own key while there is none,
// and writes NAME.crt and NAME.key.
func (p *pki) issue(name string, template *x509.Certificate) (*x509.Certificate, crypto.Signer, error) {
	key, err := p.newKey(name)
	if err != nil {
		return nil, nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, nil, err
	}
	template.SerialNumber = serial
	template.NotBefore = time.Now().Add(-time.Hour)
	template.NotAfter = time.Now().Add(30 * 24 * time.Hour)
	signer := p.key
	if signer == nil {
		signer = key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, p.ca, key.Public(), signer)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate %s: %w", name, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	return cert, key, writePEM(p.path(name+".crt"), "CERTIFICATE", der)
}

// certificate makes one that serves and asks. names are its DNS names and addresses.
func (p *pki) certificate(name, user, group string, names ...string) error {
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: user},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if group != "" {
		template.Subject.Organization = []string{group}
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	_, _, err := p.issue(name, template)
	return err
}

// kubeconfig writes a client's configuration with the certificate name, as NAME.conf.
func (p *pki) kubeconfig(name string) (string, error) {
	var content [3][]byte
	for i, file := range []string{"ca.crt", name + ".crt", name + ".key"} {
		text, err := os.ReadFile(p.path(file))
		if err != nil {
			return "", err
		}
		content[i] = text // which encoding/json writes as base64
	}
	text, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "cluster",
		"clusters": []any{map[string]any{"name": "cluster", "cluster": map[string]any{
			"server": "https://" + underlay4(1) + ":6443", "certificate-authority-data": content[0]}}},
		"users": []any{map[string]any{"name": name, "user": map[string]any{
			"client-certificate-data": content[1], "client-key-data": content[2]}}},
		"contexts": []any{map[string]any{"name": "cluster", "context": map[string]any{"cluster": "cluster", "user": name}}},
	})
	if err != nil {
		return "", err
	}
	path := p.path(name + ".conf")
	return path, os.WriteFile(path, text, 0o600)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
