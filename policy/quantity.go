package policy

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// A quantity is a decimal number and a suffix, as in Kubernetes: K, M, G, T, P are powers of 1000;
// Ki, Mi, Gi, Ti, Pi are powers of 1024. Links are sold and shaped in powers of ten, so Bandwidth
// takes only those.

// Bandwidth is in bits per second, as in the CNI bandwidth plugin.
type Bandwidth int64

// Bytes is an amount of data.
type Bytes int64

// Bounds on a bandwidth, those of Kubernetes for its pod annotations.
const (
	MinBandwidth Bandwidth = 1e3
	MaxBandwidth Bandwidth = 1e15
)

type unit struct {
	suffix string
	factor uint64
}

var (
	siUnits  = []unit{{"P", 1e15}, {"T", 1e12}, {"G", 1e9}, {"M", 1e6}, {"K", 1e3}, {"k", 1e3}}
	iecUnits = []unit{{"Pi", 1 << 50}, {"Ti", 1 << 40}, {"Gi", 1 << 30}, {"Mi", 1 << 20}, {"Ki", 1 << 10}}
)

func (b Bandwidth) String() string { return formatQuantity(int64(b), siUnits) }

// MarshalText returns the shortest exact form that Parse reads back.
func (b Bandwidth) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText reads the output of MarshalText.
func (b *Bandwidth) UnmarshalText(text []byte) (err error) {
	*b, err = parseBandwidth(string(text))
	return err
}

func (b Bytes) String() string {
	si, iec := formatQuantity(int64(b), siUnits), formatQuantity(int64(b), iecUnits)
	if len(iec) < len(si) {
		return iec
	}
	return si
}

// MarshalText returns the shortest exact form that Parse reads back.
func (b Bytes) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText reads the output of MarshalText.
func (b *Bytes) UnmarshalText(text []byte) (err error) {
	*b, err = parseBytes(string(text))
	return err
}

func formatQuantity(v int64, units []unit) string {
	for _, u := range units {
		if f := int64(u.factor); v != 0 && v%f == 0 {
			return strconv.FormatInt(v/f, 10) + u.suffix
		}
	}
	return strconv.FormatInt(v, 10)
}

func parseBandwidth(s string) (Bandwidth, error) {
	const want = "bits per second such as 512K, 10M or 1.5G (K, M, G, T: powers of 1000)"
	for _, u := range iecUnits {
		if strings.HasSuffix(s, u.suffix) {
			return 0, fmt.Errorf("%q is in powers of 1024; expected %s", s, want)
		}
	}
	v, ok := parseQuantity(s, siUnits)
	switch b := Bandwidth(v); {
	case !ok:
		return 0, fmt.Errorf("%q is not a bandwidth; expected %s", s, want)
	case b < MinBandwidth || b > MaxBandwidth:
		return 0, fmt.Errorf("%q is out of range; expected %v to %v bits per second", s, MinBandwidth, MaxBandwidth)
	default:
		return b, nil
	}
}

func parseBytes(s string) (Bytes, error) {
	v, ok := parseQuantity(s, append(iecUnits[:len(iecUnits):len(iecUnits)], siUnits...))
	if !ok || v < 1 {
		return 0, fmt.Errorf("%q is not an amount of bytes; expected a number of at least 1 such as 500M (powers of 1000) or 512Mi (powers of 1024)", s)
	}
	return Bytes(v), nil
}

// parseQuantity reads digits, an optional decimal fraction and an optional suffix. It fails if the
// result is not a whole number that fits int64.
func parseQuantity(s string, units []unit) (int64, bool) {
	factor := uint64(1)
	for _, u := range units {
		if rest, found := strings.CutSuffix(s, u.suffix); found {
			s, factor = rest, u.factor
			break
		}
	}
	whole, frac, dotted := strings.Cut(s, ".")
	digits := whole + frac
	if whole == "" || dotted && frac == "" || len(digits) > 18 || strings.Trim(digits, "0123456789") != "" {
		return 0, false
	}
	mantissa, err := strconv.ParseUint(digits, 10, 64)
	if err != nil {
		return 0, false
	}
	divisor := uint64(1)
	for range frac {
		divisor *= 10
	}
	hi, lo := bits.Mul64(mantissa, factor)
	if hi >= divisor {
		return 0, false
	}
	q, rem := bits.Div64(hi, lo, divisor)
	return int64(q), rem == 0 && q <= math.MaxInt64
}
