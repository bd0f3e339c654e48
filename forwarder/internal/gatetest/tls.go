package gatetest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"testing"
	"time"
)

// ClientHello returns the first bytes that crypto/tls sends to a server of that name.
func ClientHello(t testing.TB, name string) []byte {
	t.Helper()
	client, far := net.Pipe()
	defer far.Close()
	go func() {
		_ = tls.Client(client, &tls.Config{ServerName: name, InsecureSkipVerify: true}).HandshakeContext(context.Background())
		client.Close()
	}()
	b := make([]byte, 16<<10)
	n, err := far.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

// Records cuts a ClientHello into records of n bytes each.
func Records(b []byte, n int) []byte {
	var out []byte
	for msg := b[5:]; len(msg) > 0; msg = msg[min(n, len(msg)):] {
		k := min(n, len(msg))
		out = append(append(out, 22, 3, 1, byte(k>>8), byte(k)), msg[:k]...)
	}
	return out
}

// Spelled puts another name of the same length into a hello whose name is all x's.
func Spelled(hello []byte, name string) []byte {
	return bytes.Replace(hello, bytes.Repeat([]byte("x"), len(name)), []byte(name), 1)
}

// HandshakeOf returns the content of the handshake's records.
func HandshakeOf(p []byte) (all []byte) {
	for len(p) >= 5 {
		n := min(len(p), 5+int(p[3])<<8+int(p[4]))
		if p[0] == 22 {
			all = append(all, p[5:n]...)
		}
		p = p[n:]
	}
	return all
}

// SelfSigned returns a self-signed certificate for a.example.
func SelfSigned(t testing.TB) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"a.example"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}
