package main

// web serves the protocols that web programs speak, each on its own port, at every address:
//
//	8081 tcp  HTTP/1.1 and, with prior knowledge, HTTP/2
//	8082 tcp  gRPC: the health service and reflection
//	8444 tcp  HTTP/1.1 and HTTP/2 over TLS
//	8444 udp  HTTP/3
//	8445 tcp  gRPC over TLS
//
//	/bytes/N   N bytes that depend on N alone, in ranges too
//	/chunked/N the same in chunks, without a length, with a trailer
//	/gzip/N    the same, compressed for every client
//	/digest    answers "N SHA-256" of what is sent
//	/move      to /bytes/100
//	/events    three events of an event stream, 20 ms apart
//	/early     103 before the 200
//	/status/N  an answer of that status
//	/login     401 unless user:secret is said (Basic)
//	/ws        a WebSocket that echoes
//	/git/      the repositories below -git, to be cloned and pushed to

import (
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cgi"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/quic-go/quic-go/http3"
	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"
)

func web(args []string) error {
	fs := flag.NewFlagSet("web", flag.ExitOnError)
	certFile := fs.String("cert", "cert.pem", "the server's certificate")
	keyFile := fs.String("key", "key.pem", "its key")
	repositories := fs.String("git", "", "where the repositories are")
	if err := fs.Parse(args); err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(*certFile, *keyFile)
	if err != nil {
		return err
	}
	secure := &tls.Config{Certificates: []tls.Certificate{cert}}
	handler, err := webHandler(*repositories)
	if err != nil {
		return err
	}
	failed := make(chan error)
	for _, host := range []string{"0.0.0.0", "::"} {
		listeners := map[int]net.Listener{}
		for _, port := range []int{8081, 8082, 8444, 8445} {
			if listeners[port], err = listenTCP(host, port); err != nil {
				return err
			}
		}
		srv := &http.Server{Handler: handler, Protocols: new(http.Protocols), TLSConfig: secure.Clone()}
		srv.Protocols.SetHTTP1(true)
		srv.Protocols.SetHTTP2(true)
		srv.Protocols.SetUnencryptedHTTP2(true)
		go func() { failed <- srv.Serve(listeners[8081]) }()
		go func() { failed <- srv.ServeTLS(listeners[8444], "", "") }()
		go func() { failed <- healthServer().Serve(listeners[8082]) }()
		go func() { failed <- healthServer(grpc.Creds(credentials.NewTLS(secure.Clone()))).Serve(listeners[8445]) }()
	}
	for _, host := range ownAddresses() {
		c, err := listenUDP(host, 8444)
		if err != nil {
			return err
		}
		h3 := &http3.Server{Handler: handler, TLSConfig: http3.ConfigureTLSConfig(secure.Clone())}
		go func() { failed <- h3.Serve(c) }()
	}
	say(seen{Event: "listening", Port: 8081})
	return <-failed
}

func healthServer(options ...grpc.ServerOption) *grpc.Server {
	s := grpc.NewServer(options...)
	h := health.NewServer()
	h.SetServingStatus("peer", grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(s, h)
	reflection.Register(s)
	return s
}

// content holds the bytes of /bytes/N.
func content(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8 + n)
	}
	return b
}

func webHandler(repositories string) (http.Handler, error) {
	mux := http.NewServeMux()
	mux.HandleFunc("/", hello)
	sized := func(path string, answer func(http.ResponseWriter, *http.Request, int)) {
		mux.HandleFunc(path+"{n}", func(w http.ResponseWriter, r *http.Request) {
			n, err := strconv.Atoi(r.PathValue("n"))
			if err != nil || n < 0 || n > 1<<28 {
				http.Error(w, "not a size", http.StatusBadRequest)
				return
			}
			answer(w, r, n)
		})
	}
	sized("/bytes/", func(w http.ResponseWriter, r *http.Request, n int) {
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content(n)))
	})
	sized("/chunked/", func(w http.ResponseWriter, _ *http.Request, n int) {
		w.Header().Set("Trailer", "X-Size")
		for b := content(n); len(b) > 0; {
			size := min(len(b), 10000)
			w.Write(b[:size])
			b = b[size:]
			http.NewResponseController(w).Flush()
		}
		w.Header().Set("X-Size", strconv.Itoa(n))
	})
	sized("/gzip/", func(w http.ResponseWriter, _ *http.Request, n int) {
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		z.Write(content(n))
		z.Close()
	})
	sized("/status/", func(w http.ResponseWriter, _ *http.Request, n int) {
		http.Error(w, "as asked", n)
	})
	mux.Handle("/move", http.RedirectHandler("/bytes/100", http.StatusMovedPermanently))
	mux.HandleFunc("/events", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 3 {
			fmt.Fprintf(w, "data: event %d\n\n", i)
			http.NewResponseController(w).Flush()
			time.Sleep(20 * time.Millisecond) // a stream that arrives at once is none
		}
	})
	mux.HandleFunc("/early", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		io.WriteString(w, "late\n")
	})
	mux.HandleFunc("/login", func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "user" || password != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="peer"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		io.WriteString(w, "welcome\n")
	})
	mux.Handle("/ws", websocket.Server{Handler: func(c *websocket.Conn) { io.Copy(c, c) }})
	if repositories == "" {
		return mux, nil
	}
	out, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		return nil, fmt.Errorf("asking git where its programs are: %w", err)
	}
	mux.Handle("/git/", &cgi.Handler{Path: filepath.Join(strings.TrimSpace(string(out)), "git-http-backend"), Root: "/git", Stderr: os.Stderr,
		Env: []string{"GIT_PROJECT_ROOT=" + repositories, "GIT_HTTP_EXPORT_ALL=1", "REMOTE_USER=tester",
			"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"}})
	return mux, nil
}
