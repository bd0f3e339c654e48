package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"syscall"
	"time"
)

// ErrNotRunning means that no process listens on the control socket.
var ErrNotRunning = errors.New("the sandbox is not running")

// Client talks to one sandbox. Each call uses its own connection, so a Client holds no resources
// and is safe for concurrent use.
type Client struct {
	// Path is the path of the control socket.
	Path string
}

// Call sends one request and decodes the answer into result, which may be nil.
func (c Client) Call(ctx context.Context, method string, params, result any) error {
	s, err := c.Open(ctx, method, params, result)
	if err != nil {
		return err
	}
	return s.Close()
}

// Stream is the rest of a connection after the first answer of a streaming method.
type Stream struct {
	conn Conn
	r    *bufio.Reader
	stop func() bool
}

// Open sends one request, decodes the first answer into result (which may be
// nil) and returns the rest of the connection. The stream ends with ctx.
func (c Client) Open(ctx context.Context, method string, params, result any) (*Stream, error) {
	s, err := c.open(ctx, method, params, result)
	// A worker that dies while it holds the request gives no answer, but its successor will.
	// Read-only requests are sent again, once.
	if readOnly[method] && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)) {
		return c.open(ctx, method, params, result)
	}
	return s, err
}

var readOnly = map[string]bool{
	MethodInfo: true, MethodFlows: true, MethodFlowsWatch: true, MethodPolicyShow: true, MethodPorts: true,
	MethodStats: true, MethodSysctl: true, MethodCapture: true, MethodLogs: true,
}

func (c Client) open(ctx context.Context, method string, params, result any) (*Stream, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.Path)
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return nil, ErrNotRunning
	case err != nil:
		return nil, fmt.Errorf("connect to the control socket: %w", err)
	}
	return Exchange(ctx, conn, method, params, result)
}

// Exchange is Open over an existing connection. It takes ownership of conn.
func Exchange(ctx context.Context, conn net.Conn, method string, params, result any) (*Stream, error) {
	req := Request{Method: method}
	if params != nil {
		raw, err := json.Marshal(params)
		if err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("encode the request: %w", err)
		}
		req.Params = raw
	}
	s := newStream(ctx, conn)
	// A server that refuses the peer answers before it reads, and its answer says more than the
	// write error.
	werr := WriteLine(conn, req)
	return s.first(ctx, method, result, werr)
}

// Answer is Exchange for a request that has already reached the other side another way.
func Answer(ctx context.Context, conn Conn, method string, result any) (*Stream, error) {
	return newStream(ctx, conn).first(ctx, method, result, nil)
}

// Conn is what a Stream needs of a connection. A net.Conn has it, and so does a socket as an
// os.File.
type Conn interface {
	io.ReadCloser
	SetDeadline(time.Time) error
}

func newStream(ctx context.Context, conn Conn) *Stream {
	s := &Stream{conn: conn, r: bufio.NewReaderSize(conn, 64<<10)}
	s.stop = context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	return s
}

// first reads the first answer, and closes the stream if there is none.
func (s *Stream) first(ctx context.Context, method string, result any, werr error) (*Stream, error) {
	err := s.answer(method, result, werr)
	if err == nil {
		return s, nil
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	_ = s.Close()
	return nil, err
}

func (s *Stream) answer(method string, result any, werr error) error {
	var resp Response
	if err := s.Next(&resp); err != nil {
		return fmt.Errorf("%s: no answer from the sandbox: %w", method, errors.Join(werr, err))
	}
	if resp.Error != nil {
		return resp.Error
	}
	if result == nil || len(resp.Result) == 0 {
		return nil
	}
	if err := json.Unmarshal(resp.Result, result); err != nil {
		return fmt.Errorf("%s: decode the answer: %w", method, err)
	}
	return nil
}

// Next decodes the next line into v. At the end of the stream it returns io.EOF.
func (s *Stream) Next(v any) error {
	var line []byte
	for {
		part, err := s.r.ReadSlice('\n')
		if len(line)+len(part) > MaxResponse {
			return fmt.Errorf("an answer longer than %d bytes", MaxResponse)
		}
		line = append(line, part...)
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if errors.Is(err, io.EOF) && len(line) > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		return json.Unmarshal(line, v)
	}
}

// Read reads the raw bytes that follow the first answer: a capture.
func (s *Stream) Read(p []byte) (int, error) { return s.r.Read(p) }

// CloseWrite tells the other side that the client wants nothing more. What the other side still
// sends can be read.
func (s *Stream) CloseWrite() error {
	if c, ok := s.conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Close ends the stream.
func (s *Stream) Close() error {
	s.stop()
	return s.conn.Close()
}
