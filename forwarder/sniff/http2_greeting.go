package sniff

import "encoding/binary"

// A client of HTTP/2 may wait for its SETTINGS to be acknowledged, and for an answer to PING,
// before it makes a request. Until its frames reach a server, we answer as an endpoint whose every
// limit is the protocol's default (RFC 9113, section 6.5).

const (
	settingPush      = 2
	settingWindow    = 4
	settingFrameSize = 5

	firstWindow = 1<<16 - 1 // of a connection
	maxWindow   = 1<<31 - 1
)

// EmptySettings is a SETTINGS frame that announces nothing.
const EmptySettings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00"

// The acknowledgement of SETTINGS, and the header of the answer to PING.
const (
	settingsAck = "\x00\x00\x00\x04\x01\x00\x00\x00\x00"
	pingAck     = "\x00\x00\x08\x06\x01\x00\x00\x00\x00"
)

// Greeting answers the frames that a client sends before its first request. The zero value has
// heard nothing.
type Greeting struct {
	frames   Frames
	heard    int
	settings int
	window   int64 // that the client has added to the connection's
}

// Heard is the number of bytes, including the preface, that have been read and, where they ask for
// an answer, answered.
func (g *Greeting) Heard() int { return g.heard }

// Settings is how many SETTINGS frames were acknowledged. With the first acknowledgement the client
// is also sent SETTINGS, which it acknowledges.
func (g *Greeting) Settings() int { return g.settings }

// Hear returns a server's answer to the frames in p that it has not heard before. p holds
// everything that the client has sent, from the preface to at most the first header block. At an
// error, a server that saw the frames would end the connection.
func (g *Greeting) Hear(p []byte) (say []byte, err error) {
	if len(p) < len(preface) || !hasPrefix(p, preface) {
		return nil, nil
	}
	g.heard = max(g.heard, len(preface))
	for {
		rest := p[g.heard:]
		fr, need, err := g.frames.Next(rest)
		if err != nil {
			return say, err
		}
		if need > 0 || fr.Fields || len(rest) < fr.Size {
			return say, nil
		}
		if say, err = g.answer(say, rest[:fr.Size], fr); err != nil {
			return say, err
		}
		g.heard += fr.Size
	}
}

// answer appends the answer to one frame.
func (g *Greeting) answer(say, frame []byte, fr Frame) ([]byte, error) {
	content := frame[frameHeader:]
	switch typ := frame[3]; {
	case typ == frameSettings && !fr.Ack:
		if err := checkSettings(content); err != nil {
			return say, err
		}
		if g.settings++; g.settings == 1 {
			say = append(say, EmptySettings...)
		}
		return append(say, settingsAck...), nil
	case fr.Ping:
		return append(append(say, pingAck...), content...), nil
	case typ == frameWindowUpdate:
		n := int64(binary.BigEndian.Uint32(content) &^ (1 << 31))
		if n == 0 {
			return say, ErrMalformed
		}
		if g.window += n; g.window > maxWindow-firstWindow {
			return say, ErrFlowControl
		}
	case typ == framePriority && binary.BigEndian.Uint32(content)&^(1<<31) == fr.Stream:
		return say, ErrMalformed // a stream that depends on itself
	}
	if fr.Stream != 0 && (frame[3] == frameWindowUpdate || frame[3] == frameReset) {
		return say, ErrMalformed // on a stream that has not begun
	}
	return say, nil
}

// checkSettings rejects values that no server accepts (RFC 9113, section 6.5.2).
func checkSettings(content []byte) error {
	for ; len(content) > 0; content = content[6:] {
		value := binary.BigEndian.Uint32(content[2:])
		switch binary.BigEndian.Uint16(content) {
		case settingPush:
			if value > 1 {
				return ErrMalformed
			}
		case settingWindow:
			if value > maxWindow {
				return ErrFlowControl
			}
		case settingFrameSize:
			if value < frameMax || value > 1<<24-1 {
				return ErrMalformed
			}
		}
	}
	return nil
}
