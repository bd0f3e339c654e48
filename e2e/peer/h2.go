package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

type h2Result struct {
	OK          int    `json:"ok"`              // answers of status 200 to the first URL
	Connections int64  `json:"connections"`     // connections that it took
	Status      int    `json:"status"`          // of the second URL's answer
	Body        string `json:"body"`            // body of the second URL's answer
	Error       string `json:"error,omitempty"` // the first one
}

// h2 asks for a URL many times at once, by HTTP/2 with prior knowledge, then for another one on the
// same connection.
func h2(args []string) error {
	fs := flag.NewFlagSet("h2", flag.ExitOnError)
	n := fs.Int("n", 1, "requests for the first URL")
	timeout := fs.Duration("timeout", 20*time.Second, "for everything")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if fs.NArg() < 1 || fs.NArg() > 2 {
		return fmt.Errorf("usage: h2 [-n N] URL [URL]")
	}
	var res h2Result
	var connections atomic.Int64
	tr := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, network, to string) (net.Conn, error) {
		connections.Add(1)
		return new(net.Dialer).DialContext(ctx, network, to)
	}}
	tr.Protocols.SetUnencryptedHTTP2(true)
	client := &http.Client{Transport: tr, Timeout: *timeout}
	get := func(url string) (status int, body string, err error) {
		answer, err := client.Get(url)
		if err != nil {
			return 0, "", err
		}
		defer answer.Body.Close()
		b, err := io.ReadAll(answer.Body)
		return answer.StatusCode, string(b), err
	}
	var mu sync.Mutex
	first := func() {
		status, _, err := get(fs.Arg(0))
		mu.Lock()
		defer mu.Unlock()
		if err != nil && res.Error == "" {
			res.Error = err.Error()
		} else if err == nil && status == http.StatusOK {
			res.OK++
		}
	}
	first() // the others find its connection
	var all sync.WaitGroup
	for range *n - 1 {
		all.Go(first)
	}
	all.Wait()
	if fs.NArg() == 2 {
		var err error
		if res.Status, res.Body, err = get(fs.Arg(1)); err != nil && res.Error == "" {
			res.Error = err.Error()
		}
	}
	res.Connections = connections.Load()
	say(res)
	return nil
}
