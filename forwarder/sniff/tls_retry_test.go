package sniff

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"net"
	"testing"
)

// serverHello returns the first answer to a hello from a server that knows one curve.
func serverHello(t testing.TB, curve tls.CurveID, version uint16) []byte {
	t.Helper()
	client, far := net.Pipe()
	defer client.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = tls.Server(far, &tls.Config{CurvePreferences: []tls.CurveID{curve}, MaxVersion: version, GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return &tls.Certificate{Certificate: [][]byte{{1}}, PrivateKey: key}, nil
		}}).Handshake()
		far.Close()
	}()
	go func() {
		_, _ = client.Write(hello(t, "a.example", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519, tls.CurveP256} }))
	}()
	b := make([]byte, 1<<10)
	n, err := client.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

func TestAnswersToAHello(t *testing.T) {
	settled, retry := serverHello(t, tls.X25519, tls.VersionTLS13), serverHello(t, tls.CurveP256, tls.VersionTLS13)
	older := serverHello(t, tls.X25519, tls.VersionTLS12)
	const alert, change = "\x15\x03\x03\x00\x02\x01\x70", "\x14\x03\x03\x00\x01\x01"
	// cut splits the same answer into other records.
	cut := func(b []byte) []byte {
		n := 5 + int(b[3])<<8 + int(b[4])
		return append(records(b[:n], 1), b[n:]...)
	}
	join := func(all ...[]byte) []byte { return bytes.Join(all, nil) }
	for _, row := range []struct {
		what   string
		answer []byte
		want   HelloAnswer
	}{
		{"nothing", nil, HelloAnswer{}},
		{"half of one", settled[:20], HelloAnswer{}},
		{"a ServerHello", settled, HelloAnswer{Settled: true}},
		{"one of TLS 1.2", older, HelloAnswer{Settled: true}},
		{"one behind a warning", join([]byte(alert), older), HelloAnswer{Settled: true}},
		{"one in records of one byte", cut(settled), HelloAnswer{Settled: true}},
		{"a HelloRetryRequest", retry, HelloAnswer{Retries: 1}},
		{"one in records of one byte", cut(retry), HelloAnswer{Retries: 1}},
		{"one, and the change of ciphers", join(retry, []byte(change)), HelloAnswer{Retries: 1}},
		{"one, and then a ServerHello", join(retry, []byte(change), settled), HelloAnswer{Retries: 1, Settled: true}},
		{"one, and another one", join(retry, retry), HelloAnswer{Retries: 2}},
		{"an alert alone", []byte(alert), HelloAnswer{}},
		{"something encrypted", []byte("\x17\x03\x03\x00\x01x"), HelloAnswer{Foreign: true}},
		{"another message", []byte("\x16\x03\x03\x00\x04\x00\x00\x00\x00"), HelloAnswer{Foreign: true}},
		{"a ServerHello that is too short", join([]byte("\x16\x03\x03\x00\x26\x02\x00\x00\x05\x03\x03"), []byte(retryRandom)), HelloAnswer{Foreign: true, Retries: 1}},
		{"an empty record", []byte("\x16\x03\x03\x00\x00"), HelloAnswer{Foreign: true}},
		{"plain bytes", []byte("220 mail.example\r\n"), HelloAnswer{Foreign: true}},
		{"a few plain bytes", []byte("ok\r\n"), HelloAnswer{}},
	} {
		for _, step := range []int{1, 3, 1 << 10} {
			var a HelloAnswer
			for p := row.answer; len(p) > 0; p = p[min(step, len(p)):] {
				a.Feed(p[:min(step, len(p))])
			}
			if got := (HelloAnswer{Retries: a.Retries, Settled: a.Settled, Foreign: a.Foreign}); got != row.want {
				t.Errorf("%s, %d bytes at a time: %+v, want %+v", row.what, step, got, row.want)
			}
		}
	}
}

func TestRecordsOfAClient(t *testing.T) {
	for _, row := range []struct {
		what, in string
		want     Record
		need     int
		bad      bool
	}{
		{"nothing", "", Record{}, 5, false},
		{"a hello", "\x16\x03\x01\x00\x09\x01", Record{Size: 14, Handshake: true, Hello: true}, 0, false},
		{"a hello that has not begun", "\x16\x03\x01\x00\x09", Record{}, 6, false},
		{"a key exchange", "\x16\x03\x03\x00\x09\x10", Record{Size: 14, Handshake: true}, 0, false},
		{"an alert", "\x15\x03\x03\x00\x02", Record{Size: 7, Alert: true}, 0, false},
		{"the change of ciphers", "\x14\x03\x03\x00\x01", Record{Size: 6}, 0, false},
		{"data", "\x17\x03\x03\x48\x00", Record{Size: 5 + 1<<14 + 2048}, 0, false},
		{"empty data", "\x17\x03\x03\x00\x00", Record{Size: 5}, 0, false},
		{"a record that is too long", "\x17\x03\x03\x48\x01", Record{}, 0, true},
		{"an empty record", "\x16\x03\x03\x00\x00", Record{}, 0, true},
		{"another type", "\x18\x03\x03\x00\x01", Record{}, 0, true},
		{"another version", "\x16\x02\x03\x00\x01", Record{}, 0, true},
		{"plain bytes", "STARTTLS\r\n", Record{}, 0, true},
	} {
		r, need, err := NextRecord([]byte(row.in))
		if need != row.need || (err != nil) != row.bad || need == 0 && err == nil && r != row.want {
			t.Errorf("%s: %+v, %d, %v", row.what, r, need, err)
		}
	}
}
