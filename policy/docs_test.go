package policy

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

// The reference is kept true: its examples parse, and it names every entity,
// every metadata service and every field that the parser knows.
func TestTheReferenceIsTrue(t *testing.T) {
	data, err := os.ReadFile("../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllSubmatch(data, -1)
	if len(blocks) == 0 {
		t.Error("no example")
	}
	for _, b := range blocks {
		p, err := Parse("docs/policy.md", b[1])
		if err != nil {
			t.Error(err)
			continue
		}
		mustCompile(t, p, here)
	}
	var words []string
	for _, e := range entities {
		words = append(words, "`"+string(e)+"`")
	}
	for _, p := range metadataServices {
		words = append(words, p.Addr().String())
	}
	for _, p := range protocols {
		words = append(words, "`"+p.name+"`")
	}
	for _, q := range queryTypes {
		words = append(words, "`"+q.name+"`")
	}
	for _, r := range refusals {
		words = append(words, "`"+string(r)+"`")
	}
	for _, m := range modes {
		words = append(words, "`"+string(m)+"`")
	}
	for _, rule := range []string{rulePlainDNS, ruleDNSOverTLS, ruleDoH} {
		words = append(words, "`"+rule+"`")
	}
	for _, port := range append(serverFirst, nameless...) {
		words = append(words, fmt.Sprint(port))
	}
	words = append(words, fmt.Sprintf("`%d`, `%d`, `%.1f`, `%d`", DefaultMaxLabelLength, DefaultMaxWildcardLength, DefaultMaxWildcardEntropy, DefaultMaxNamesPerMinute))
	words = append(words, Duration(DefaultTTLFloor).String(), Duration(DefaultTTLCap).String(), fmt.Sprint(MaxNames), fmt.Sprint(MaxGrantsPerName, " addresses a name"), fmt.Sprint(MaxNamesPerAddress, " names an address"))
	// The fields are what an empty mapping is told to have.
	for _, file := range []string{head + "spec: 1", head + "spec: {limits: 1}", head + "spec: {egress: [1], ingress: [1]}",
		head + "spec: {dns: 1, egress: [{action: drop, to: [1], ports: [1], icmp: [1], http: [1], limits: 1}]}"} {
		_, err := Parse("f", []byte(file))
		for _, m := range regexp.MustCompile(`expected a mapping with (.*)`).FindAllStringSubmatch(err.Error(), -1) {
			words = append(words, strings.Split(m[1], ", ")...)
		}
	}
	for _, w := range words {
		if !strings.Contains(string(data), w) {
			t.Errorf("docs/policy.md does not mention %s", w)
		}
	}
}
