package policy

import (
	"bytes"
	"encoding/json"
	"fmt"

	"go.yaml.in/yaml/v3"
)

// YAML prints the policy in the form that Parse reads back to the same value.
//
// JSON is YAML, and the struct tags already define the form, so the JSON is parsed into a tree and
// only its style is changed.
func (p *Policy) YAML() ([]byte, error) {
	j, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("print policy: %w", err)
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(j, &doc); err != nil {
		return nil, fmt.Errorf("print policy: %w", err)
	}
	blockStyle(&doc)
	var out bytes.Buffer
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(2)
	if err := enc.Encode(&doc); err != nil {
		return nil, fmt.Errorf("print policy: %w", err)
	}
	return out.Bytes(), nil
}

func blockStyle(n *yaml.Node) {
	n.Style = 0
	for _, c := range n.Content {
		blockStyle(c)
	}
}

// UnmarshalJSON reads the output of json.Marshal, as strictly as Parse.
func (p *Policy) UnmarshalJSON(b []byte) error {
	q, err := Parse("policy", b)
	if err != nil {
		return err
	}
	*p = *q
	return nil
}
