package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"sluice.dev/sluice/policy"
	"sluice.dev/sluice/tun"
)

// DefaultStateDir is where attachments are recorded. It need not survive a reboot, since
// attachments do not.
const DefaultStateDir = "/run/sluice-cni"

// Config is one plugin configuration as the runtime passes it on standard input. Decoding is
// strict: an unknown key is an error, because a misspelt policy would otherwise be no policy.
type Config struct {
	CNIVersion   string          `json:"cniVersion"`
	Name         string          `json:"name"`
	Type         string          `json:"type"`
	Capabilities map[string]bool `json:"capabilities,omitempty"`
	Args         json.RawMessage `json:"args,omitempty"` // the runtime's own; not for us to check

	// Delegate is the main plugin's configuration, or a list of them run in order, when
	// sluice is not chained after one. Without prevResult the default is ptp with host-local.
	Delegate delegates `json:"delegate,omitempty"`
	// Policy is a policy (docs/policy.md) or the absolute path of a file with one.
	Policy policySource `json:"policy,omitzero"`
	// PolicyDir holds NAMESPACE/NAME.yaml for pods with their own policy, and NAMESPACE.yaml for
	// the other pods of a namespace. It takes precedence over Policy.
	PolicyDir string `json:"policyDir,omitempty"`
	// FailClosed starts a pod without a policy with everything denied, until it gets one. Otherwise
	// the pod is open, as in a cluster without policies.
	FailClosed bool `json:"failClosed,omitempty"`

	// Resolvers are asked for the names that a pod's policy allows (resolvers.go).
	Resolvers resolverList `json:"resolvers,omitempty"`

	// MetadataAddresses are metadata services in addition to the known ones (docs/policy.md),
	// NAT64Prefixes the prefixes of the network's translators. Both can only close addresses.
	MetadataAddresses []string `json:"metadataAddresses,omitempty"`
	NAT64Prefixes     []string `json:"nat64Prefixes,omitempty"`

	Mode   string   `json:"mode,omitempty"` // "tap" (default) or "tun"
	MTU    mtu      `json:"mtu,omitempty"`  // bytes; "auto" (default) is the main interface's
	Select Selector `json:"select,omitzero"`

	Sysctl  map[string]string `json:"sysctl,omitempty"` // the flow table's, by nf_conntrack's names
	Limits  json.RawMessage   `json:"limits,omitempty"` // in the form of a policy's spec.limits
	FlowLog string            `json:"flowLog,omitempty"`
	// FlowLogMaxSize is in bytes with an optional suffix; FlowLogMaxFiles includes the file being
	// written. See `sluice run --help`.
	FlowLogMaxSize  string `json:"flowLogMaxSize,omitempty"`
	FlowLogMaxFiles int    `json:"flowLogMaxFiles,omitempty"`
	StateDir        string `json:"stateDir,omitempty"`

	// SetDisableCheck records that `install` switched the list's CHECK off, for `uninstall`.
	SetDisableCheck bool `json:"setDisableCheck,omitempty"`

	RuntimeConfig    runtimeConfig        `json:"runtimeConfig,omitzero"`
	RawPrevResult    json.RawMessage      `json:"prevResult,omitempty"`
	ValidAttachments []types.GCAttachment `json:"cni.dev/valid-attachments,omitempty"`
	// The name of this list in drafts of the specification; some runtimes send both.
	OldValidAttachments []types.GCAttachment `json:"cni.dev/attachments,omitempty"`

	kind       tun.Kind
	metadata   []netip.Prefix   // of MetadataAddresses
	nat64      []netip.Prefix   // of NAT64Prefixes
	prevResult *types100.Result // nil without one
}

// runtimeConfig is what the runtime fills in for declared capabilities. Those that Sluice does not
// use are for the delegates; both use DNS.
type runtimeConfig struct {
	PortMappings json.RawMessage   `json:"portMappings,omitempty"`
	Bandwidth    *Bandwidth        `json:"bandwidth,omitempty"`
	DNS          json.RawMessage   `json:"dns,omitempty"`
	IPs          json.RawMessage   `json:"ips,omitempty"`
	IPRanges     json.RawMessage   `json:"ipRanges,omitempty"`
	MAC          string            `json:"mac,omitempty"`
	InfinibandID string            `json:"infinibandGUID,omitempty"`
	DeviceID     string            `json:"deviceID,omitempty"`
	Aliases      json.RawMessage   `json:"aliases,omitempty"`
	CgroupPath   string            `json:"cgroupPath,omitempty"`
	Annotations  map[string]string `json:"io.kubernetes.cri.pod-annotations,omitempty"`
}

// Bandwidth is CNI's capability: rates in bits per second, bursts in bits. Zero is
// no limit. Ingress is what the container receives.
type Bandwidth struct {
	IngressRate  uint64 `json:"ingressRate,omitempty"`
	IngressBurst uint64 `json:"ingressBurst,omitempty"`
	EgressRate   uint64 `json:"egressRate,omitempty"`
	EgressBurst  uint64 `json:"egressBurst,omitempty"`
}

// mtu is a number of bytes or "auto", which is 0.
type mtu int

func (m *mtu) UnmarshalJSON(b []byte) error {
	if bytes.Equal(b, []byte(`"auto"`)) {
		*m = 0
		return nil
	}
	var n int
	if err := json.Unmarshal(b, &n); err != nil || n < tun.MinMTU || n > tun.MaxMTU {
		return fmt.Errorf("mtu %s: want \"auto\" or a number from %d to %d", b, tun.MinMTU, tun.MaxMTU)
	}
	*m = mtu(n)
	return nil
}

// policySource is a path, or a policy written into the configuration.
type policySource struct {
	Path string
	Text []byte
}

func (p *policySource) UnmarshalJSON(b []byte) error {
	switch {
	case len(b) > 0 && b[0] == '"':
		if err := json.Unmarshal(b, &p.Path); err != nil {
			return err
		}
		if !filepath.IsAbs(p.Path) {
			return fmt.Errorf("policy %q: want a policy or the absolute path of a file with one", p.Path)
		}
	case len(b) > 0 && b[0] == '{':
		p.Text = slices.Clone(b)
	default:
		return errors.New("policy: want a policy (an object) or the path of a file (a string)")
	}
	return nil
}

// delegates are the configurations of the plugins that run before us: one or several.
type delegates []json.RawMessage

func (d *delegates) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '[' {
		return json.Unmarshal(b, (*[]json.RawMessage)(d))
	}
	*d = delegates{slices.Clone(b)}
	return nil
}

// loadConfig decodes and checks a configuration.
func loadConfig(stdin []byte) (*Config, error) {
	c := &Config{}
	d := json.NewDecoder(bytes.NewReader(stdin))
	d.DisallowUnknownFields()
	err := d.Decode(c)
	if err == nil {
		err = policyKeysSaySomething(stdin)
	}
	if err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "sluice: the network configuration", err.Error())
	}
	if err := c.check(); err != nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "sluice: the network configuration", err.Error())
	}
	return c, nil
}

// policyKeysSaySomething refuses null and "" for the keys on which a pod's policy and rules depend:
// an unfilled template must not look like an absent key.
func policyKeysSaySomething(stdin []byte) error {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(stdin, &keys); err != nil {
		return err
	}
	for key, value := range keys {
		for _, name := range []string{"policy", "policyDir", "failClosed", "metadataAddresses", "nat64Prefixes"} {
			if text := string(value); strings.EqualFold(key, name) && (text == "null" || text == `""`) {
				return fmt.Errorf("%s is %s: give it a value, or leave it out", key, text)
			}
		}
	}
	return nil
}

func (c *Config) check() error {
	switch c.Mode {
	case "", "tap":
		c.kind = tun.TAP
	case "tun":
		c.kind = tun.TUN
	default:
		return fmt.Errorf("mode %q: want tap or tun", c.Mode)
	}
	var err error
	if c.metadata, err = policy.ParseMetadata(c.MetadataAddresses); err != nil {
		return fmt.Errorf("metadataAddresses: %w", err)
	}
	if c.nat64, err = policy.ParseNAT64(c.NAT64Prefixes); err != nil {
		return fmt.Errorf("nat64Prefixes: %w", err)
	}
	if c.StateDir == "" {
		c.StateDir = DefaultStateDir
	}
	for name, path := range map[string]string{"stateDir": c.StateDir, "policyDir": c.PolicyDir, "flowLog": c.FlowLog} {
		if path != "" && !filepath.IsAbs(path) {
			return fmt.Errorf("%s %q: want an absolute path", name, path)
		}
	}
	c.StateDir = filepath.Clean(c.StateDir)
	if c.StateDir == "/" {
		return errors.New("stateDir: want a directory of its own")
	}
	if c.FlowLog == "" && (c.FlowLogMaxSize != "" || c.FlowLogMaxFiles != 0) {
		return errors.New("flowLogMaxSize and flowLogMaxFiles bound a flowLog, which is not given")
	}
	if err := c.Select.check(); err != nil {
		return err
	}
	if c.ValidAttachments == nil {
		c.ValidAttachments = c.OldValidAttachments
	}
	if len(c.RawPrevResult) > 0 && !bytes.Equal(c.RawPrevResult, []byte("null")) {
		r, err := version.NewResult(c.CNIVersion, c.RawPrevResult)
		if err != nil {
			return fmt.Errorf("prevResult: %w", err)
		}
		if c.prevResult, err = types100.NewResultFromResult(r); err != nil {
			return fmt.Errorf("prevResult: %w", err)
		}
	}
	return nil
}

// chained reports whether a main plugin ran before us. DEL of early versions comes without
// prevResult, so the delegate decides.
func (c *Config) chained() bool { return c.prevResult != nil && len(c.Delegate) == 0 }
