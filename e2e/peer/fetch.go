package main

// fetch is a client of web (web.go), as Go programs are; it prints the answers in short form.

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

type fetched struct {
	Status  int         `json:"status,omitempty"`
	Proto   string      `json:"proto,omitempty"`
	Bytes   int         `json:"bytes"`
	SHA     string      `json:"sha,omitempty"`
	Trailer http.Header `json:"trailer,omitempty"`
	Error   string      `json:"error,omitempty"` // name of the errno, "timeout", or the text
}

func fetch(args []string) error {
	fs := flag.NewFlagSet("fetch", flag.ExitOnError)
	by := fs.String("by", "http1", "http1, http2 (in clear text with prior knowledge), http3, ws or grpc")
	ca := fs.String("ca", "", "the file with the authorities to trust")
	upload := fs.Int("upload", -1, "send so many bytes")
	timeout := fs.Duration("timeout", 20*time.Second, "for the whole")
	if err := fs.Parse(args); err != nil {
		return err
	}
	to, err := url.Parse(fs.Arg(0))
	if err != nil {
		return err
	}
	secure := &tls.Config{RootCAs: x509.NewCertPool()}
	if *ca != "" {
		pem, err := os.ReadFile(*ca)
		if err != nil {
			return err
		}
		secure.RootCAs.AppendCertsFromPEM(pem)
	}
	ctx, cancel := context.WithTimeout(context.Background(), *timeout)
	defer cancel()
	var f fetched
	switch *by {
	case "ws":
		err = f.webSocket(ctx, to, secure)
	case "grpc":
		err = f.health(ctx, to, secure)
	default:
		err = f.http(ctx, *by, to, secure, *upload)
	}
	if err != nil {
		f.Error = errorName(err)
		var failed *url.Error
		if errors.As(err, &failed) {
			f.Error = errorName(failed.Err)
		}
	}
	say(f)
	return nil
}

// take records the answer's bytes in short form.
func (f *fetched) take(b []byte) {
	f.Bytes, f.SHA = len(b), fmt.Sprintf("%x", sha256.Sum256(b))[:16]
}

func (f *fetched) http(ctx context.Context, by string, to *url.URL, secure *tls.Config, upload int) error {
	var rt http.RoundTripper
	if by == "http3" {
		t := &http3.Transport{TLSClientConfig: secure}
		defer t.Close()
		rt = t
	} else {
		t := &http.Transport{TLSClientConfig: secure, Protocols: new(http.Protocols)}
		defer t.CloseIdleConnections()
		t.Protocols.SetHTTP1(by == "http1")
		t.Protocols.SetHTTP2(by == "http2")
		t.Protocols.SetUnencryptedHTTP2(by == "http2")
		rt = t
	}
	method, body := http.MethodGet, io.Reader(nil)
	if upload >= 0 {
		method, body = http.MethodPost, bytes.NewReader(content(upload))
	}
	req, err := http.NewRequestWithContext(ctx, method, to.String(), body)
	if err != nil {
		return err
	}
	answer, err := (&http.Client{Transport: rt}).Do(req)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	f.Status, f.Proto, f.Trailer = answer.StatusCode, answer.Proto, answer.Trailer
	f.take(b)
	return err
}

// webSocket exchanges messages of many sizes with an echo.
func (f *fetched) webSocket(ctx context.Context, to *url.URL, secure *tls.Config) error {
	config, err := websocket.NewConfig(to.String(), "http://"+to.Host)
	if err != nil {
		return err
	}
	config.TlsConfig = secure
	c, err := config.DialContext(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	var all []byte
	for _, size := range []int{1, 125, 126, 70000} {
		if err := websocket.Message.Send(c, content(size)); err != nil {
			return err
		}
		var got []byte
		for len(got) < size { // the echo may split it into other frames
			var part []byte
			if err := websocket.Message.Receive(c, &part); err != nil {
				return err
			}
			got = append(got, part...)
		}
		all = append(all, got...)
	}
	f.take(all)
	return nil
}

// health asks once, then watches until the first news.
func (f *fetched) health(ctx context.Context, to *url.URL, secure *tls.Config) error {
	creds := insecure.NewCredentials()
	if to.Scheme == "https" {
		creds = credentials.NewTLS(secure)
	}
	conn, err := grpc.NewClient("dns:///"+to.Host, grpc.WithTransportCredentials(creds))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := grpc_health_v1.NewHealthClient(conn)
	var said []string
	answer, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "peer"})
	said = append(said, answer.GetStatus().String())
	if err != nil {
		return err
	}
	_, err = client.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: "nobody's"})
	said = append(said, status.Code(err).String())
	watch, err := client.Watch(ctx, &grpc_health_v1.HealthCheckRequest{Service: "peer"})
	if err != nil {
		return err
	}
	if answer, err = watch.Recv(); err != nil {
		return err
	}
	said = append(said, answer.GetStatus().String())
	f.Proto = strings.Join(said, " ")
	return nil
}
