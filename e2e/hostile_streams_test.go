package e2e

// What programs in a sandbox can try by HTTP/2 in clear text.

import (
	"bytes"
	"encoding/base64"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

func hostileStreams() []attempt {
	const index = "egress[0] index"
	curl := func(flags ...string) func(bool) []string {
		return func(v6 bool) []string {
			return append([]string{"curl", "-gsS", "-m", "5", "--http2-prior-knowledge", pick(v6, "-4", "-6")}, flags...)
		}
	}
	say := func(chunk string, requests ...[]hpack.HeaderField) func(bool) []string {
		encoded := base64.StdEncoding.EncodeToString(streams(requests...))
		return func(v6 bool) []string {
			return []string{peerBin(), "dial", "-timeout", "4s", "-send-base64", encoded, "-chunk", chunk, at(pick(v6, far4, far6), 8080)}
		}
	}
	to := func(authority string, more ...hpack.HeaderField) []hpack.HeaderField {
		return append([]hpack.HeaderField{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/"}, {Name: ":authority", Value: authority}}, more...)
	}
	return []attempt{
		{name: "a granted server by another :authority", command: curl("-H", "Host: evil.test", "http://pypi.test:8080/"), reason: index},
		{name: "another :authority in segments of one byte", command: say("1", to("evil.test")), reason: index},
		{name: "another :authority on a kept HTTP/2 connection", command: say("0", to("pypi.test"), to("evil.test")), reason: index},
		{name: "another Host beside the right :authority", command: say("0", to("pypi.test", hpack.HeaderField{Name: "host", Value: "evil.test"})), reason: index},
		{name: "CONNECT by HTTP/2 through an allowed proxy", command: say("0", []hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: "pypi.test:22"}}), reason: index},
	}
}

// streams returns an HTTP/2 connection of requests without content.
func streams(requests ...[]hpack.HeaderField) []byte {
	var out, block bytes.Buffer
	out.WriteString(http2.ClientPreface)
	frames := http2.NewFramer(&out, nil)
	frames.WriteSettings() // a Buffer takes everything
	encoder := hpack.NewEncoder(&block)
	for i, fields := range requests {
		block.Reset()
		for _, f := range fields {
			encoder.WriteField(f)
		}
		frames.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true})
	}
	return out.Bytes()
}
