// Package api is the control protocol of one sandbox: the request and answer
// types, the codec both ends share, and the client.
//
//	client ── unix socket ──► monitor ──┬── answers itself (info, policy, ports, logs)
//	                                    └── hands the connection to the worker
//	                                        (flows, stats, sysctl, capture)
//
// A connection carries one request: one line of JSON, at most MaxRequest bytes. The answer is one
// line of JSON, a Response. Three methods stream after it: flows.watch and logs with follow send
// one JSON value per line until either side closes, and capture sends the bytes of a pcapng file.
//
// The package must not know how the monitor or the worker do their work, and it opens no network
// connection other than the control socket. Everything a worker answers is data from the less
// trusted side: readers bound it, and printers escape it.
package api
