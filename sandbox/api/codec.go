package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
	"unicode/utf8"
)

// ReadRequest reads the one request line of a connection. It reads no byte beyond the newline's
// buffer, gives the peer RequestTimeout, reads at most MaxRequest bytes, and refuses unknown
// fields.
func ReadRequest(c net.Conn, deadline time.Time) (Request, error) {
	var req Request
	if err := c.SetReadDeadline(deadline); err != nil {
		return req, err
	}
	line, err := readLine(c, MaxRequest)
	if err != nil {
		return req, err
	}
	if !utf8.Valid(line) {
		// The decoder would replace invalid UTF-8 with U+FFFD.
		return req, &Error{CodeBadRequest, "bad request: not UTF-8"}
	}
	if err := DecodeStrict(line, &req); err != nil {
		return req, &Error{CodeBadRequest, "bad request: " + err.Error()}
	}
	if req.Method == "" {
		return req, &Error{CodeBadRequest, `bad request: no "method"`}
	}
	return req, c.SetReadDeadline(time.Time{})
}

// readLine reads up to a newline, or to the end if the peer half-closes.
func readLine(r io.Reader, limit int) ([]byte, error) {
	var line []byte
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		if i := bytes.IndexByte(buf[:n], '\n'); i >= 0 {
			return append(line, buf[:i]...), nil
		}
		line = append(line, buf[:n]...)
		if len(line) > limit {
			return nil, &Error{CodeBadRequest, fmt.Sprintf("bad request: line longer than %d bytes", limit)}
		}
		if errors.Is(err, io.EOF) && len(line) > 0 {
			return line, nil
		}
		if err != nil {
			return nil, err
		}
	}
}

// DecodeStrict decodes one JSON value. It refuses unknown fields and anything after the value.
// Empty data decodes to the zero value.
func DecodeStrict(data []byte, v any) error {
	if len(bytes.TrimSpace(data)) == 0 {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	return nil
}

// WriteResult answers a request with a value.
func WriteResult(w io.Writer, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return WriteError(w, err)
	}
	return WriteLine(w, Response{Result: raw})
}

// WriteError answers a request with an error; an *Error keeps its code.
func WriteError(w io.Writer, err error) error {
	var e *Error
	if !errors.As(err, &e) {
		e = &Error{CodeFailed, err.Error()}
	} else if e.Message != err.Error() {
		e = &Error{e.Code, err.Error()}
	}
	return WriteLine(w, Response{Error: e})
}

// WriteLine writes one JSON value and a newline in one write.
func WriteLine(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(b, '\n'))
	return err
}
