package forwarder

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/h2c" //nolint:staticcheck // SA1019: net/http takes up no offer of h2c, as this does
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"sluice.dev/sluice/forwarder/internal/gatetest"
	"sluice.dev/sluice/internal/testutil"
)

// TestGRPCWithoutTLS has a client that waits for the server's SETTINGS before it calls.
func TestGRPCWithoutTLS(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, strings.Replace(byRequest, "/open/*", "/grpc.health.v1.Health/Check", 1), nil)
	l, err := net.Listen("tcp", addrA.String()+":8080")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	checked := health.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, checked)
	go func() { _ = srv.Serve(l) }() // until the test stops it
	defer srv.Stop()
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	dial := func(authority string) grpc_health_v1.HealthClient {
		c, err := grpc.NewClient("passthrough:///"+authority, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(),
			grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) { return g.dialContext(ctx, "tcp", to) }))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return grpc_health_v1.NewHealthClient(c)
	}
	c := dial("a.example:8080")
	for i := range 3 {
		if _, err := c.Check(ctx, &grpc_health_v1.HealthCheckRequest{}); err != nil {
			t.Fatalf("call %d: %v; counters %v", i, err, g.f.Stats())
		}
	}
	if n := g.table.Len(); n != 1 {
		t.Errorf("%d flows, want 1", n)
	}
	refused := func(what string, err error) {
		t.Helper()
		if s := status.Convert(err); s.Code() != codes.PermissionDenied || !strings.Contains(s.Message(), `rule "egress[0] api"`) {
			t.Errorf("%s: %v, want PermissionDenied that names the rule", what, err)
		}
	}
	_, err = c.List(ctx, &grpc_health_v1.HealthListRequest{})
	refused("another method on the same connection", err)
	_, err = dial("a.example:8080").List(ctx, &grpc_health_v1.HealthListRequest{})
	refused("another method first", err)
	_, err = dial("b.example:8080").Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	refused("another name", err)
	// The refused connection is over: the next call uses a new one.
	if _, err := c.Check(ctx, &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Error(err)
	}
}

// TestManyStreamsAreServed makes many requests at once on one connection, some of them large.
func TestManyStreamsAreServed(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, byRequest, nil)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16) // 1 MiB
	serveH2(t, addrA.String()+":8080", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil || r.ProtoMajor != 2 {
			w.WriteHeader(500)
		}
		_, _ = w.Write(append(body, r.URL.Path...))
	})
	tr := &http.Transport{Protocols: new(http.Protocols), DialContext: g.dialContext, DisableCompression: true}
	tr.Protocols.SetUnencryptedHTTP2(true)
	defer tr.CloseIdleConnections()
	client := &http.Client{Transport: tr, Timeout: 20 * time.Second}
	post := func(i int, size int, length int64) error {
		path := fmt.Sprintf("/open/%d", i)
		req, err := http.NewRequest("POST", "http://a.example:8080"+path, io.NopCloser(bytes.NewReader(data[:size])))
		if err != nil {
			return err
		}
		req.ContentLength = length
		res, err := client.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		got, err := io.ReadAll(res.Body)
		if err == nil && (res.StatusCode != 200 || sha256.Sum256(got) != sha256.Sum256(append(data[:size:size], path...))) {
			err = fmt.Errorf("%s: %s, %d bytes", path, res.Status, len(got))
		}
		return err
	}
	if err := post(0, 3, 3); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for i := range 40 {
		size := []int{1, 100, 20000, len(data)}[i%4]
		length := int64(size)
		if i%8 < 4 {
			length = -1
		}
		all.Go(func() {
			if err := post(i+1, size, length); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := g.table.Len(); n != 1 {
		t.Errorf("%d flows, want 1; counters %v", n, g.f.Stats())
	}
}

// TestAnUpgradeToHTTP2IsServed has golang.org/x/net's server accept an offer of h2c. The client is
// served on the same connection, where a request that no rule allows is refused.
func TestAnUpgradeToHTTP2IsServed(t *testing.T) {
	if !namespaced(t) {
		return
	}
	g := newNamed(t, byRequest, nil)
	var mu sync.Mutex
	var seen []string
	l, err := net.Listen("tcp", addrA.String()+":8080")
	if err != nil {
		t.Fatal(err)
	}
	answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, fmt.Sprintf("HTTP/%d %s", r.ProtoMajor, r.URL.Path))
	})
	srv := &http.Server{Handler: h2c.NewHandler(answer, new(http2.Server))} //nolint:staticcheck // SA1019: as above
	go func() { _ = srv.Serve(l) }()                                        // until the test closes it
	defer srv.Close()
	c := g.mustDial(netip.AddrPortFrom(addrA, 8080))
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = io.WriteString(c, "GET /open/1 HTTP/1.1\r\nHost: a.example:8080\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n")
	r := bufio.NewReader(c)
	for line := ""; line != "\r\n"; {
		if line, err = r.ReadString('\n'); err != nil || strings.HasPrefix(line, "HTTP/") && !strings.Contains(line, " 101 ") {
			t.Fatalf("the offer is answered %q, %v; counters %v", line, err, g.f.Stats())
		}
	}
	client := new(frameList)
	done := make(chan bool)
	go func() { client.follow(r, nil); close(done) }() // until the connection ends
	say := gatetest.NewSpoken()
	_ = say.WriteSettingsAck()
	_, _ = c.Write(say.Request(3, "GET", "/open/3", "a.example:8080").Bytes())
	testutil.Eventually(t, "both are answered", func() bool {
		heard := client.String() + ","
		return strings.Contains(heard, "headers 1,") && strings.Contains(heard, "headers 3,")
	})
	say.Reset()
	_, _ = c.Write(say.Request(5, "GET", "/secret", "a.example:8080").Bytes())
	<-done
	if heard := client.String(); !strings.HasSuffix(heard, "headers 5, data, goaway 5 NO_ERROR") || !errors.Is(client.end(), io.EOF) {
		t.Errorf("the client hears %q, %v, want a refusal on stream 5 and the end", heard, client.end())
	}
	c.Close()
	mu.Lock()
	defer mu.Unlock()
	if got := strings.Join(seen, ", "); got != "HTTP/1 /open/1, HTTP/2 /open/3" {
		t.Errorf("the server saw %q", got)
	}
}
