package cni

import (
	"fmt"
	"path"
	"strings"
)

// Pod is the pod that an attachment is for, as far as the runtime says.
type Pod struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`

	annotations map[string]string
}

// podOf reads CNI_ARGS, which Kubernetes' runtimes fill. Unknown keys are ignored: they are for
// other plugins of the chain.
func podOf(args string, annotations map[string]string) Pod {
	p := Pod{annotations: annotations}
	for _, pair := range strings.Split(args, ";") {
		key, value, _ := strings.Cut(pair, "=")
		switch key {
		case "K8S_POD_NAMESPACE":
			p.Namespace = value
		case "K8S_POD_NAME":
			p.Name = value
		case "K8S_POD_UID":
			p.UID = value
		}
	}
	return p
}

// Selector selects the containers that are put behind Sluice; the others keep what the main plugin
// gave them. All given conditions must hold; the zero value selects every container. A container
// that is not a pod has the namespace "".
type Selector struct {
	// Namespaces and NotNamespaces are patterns as path.Match has them.
	Namespaces    []string `json:"namespaces,omitempty"`
	NotNamespaces []string `json:"notNamespaces,omitempty"`
	// Annotations map a key to a pattern of its value. The runtime must declare the
	// capability io.kubernetes.cri.pod-annotations.
	Annotations map[string]string `json:"annotations,omitempty"`
	// NotAnnotations excludes pods that have such an annotation.
	NotAnnotations map[string]string `json:"notAnnotations,omitempty"`
}

func (s *Selector) check() error {
	for _, list := range [][]string{s.Namespaces, s.NotNamespaces} {
		for _, p := range list {
			if _, err := path.Match(p, ""); err != nil {
				return fmt.Errorf("select: the pattern %q: %w", p, err)
			}
		}
	}
	for _, m := range []map[string]string{s.Annotations, s.NotAnnotations} {
		for _, p := range m {
			if _, err := path.Match(p, ""); err != nil {
				return fmt.Errorf("select: the pattern %q: %w", p, err)
			}
		}
	}
	return nil
}

func (s *Selector) matches(p Pod) bool {
	if len(s.Namespaces) > 0 && !anyMatch(s.Namespaces, p.Namespace) {
		return false
	}
	if anyMatch(s.NotNamespaces, p.Namespace) {
		return false
	}
	for key, pattern := range s.Annotations {
		if value, ok := p.annotations[key]; !ok || !anyMatch([]string{pattern}, value) {
			return false
		}
	}
	for key, pattern := range s.NotAnnotations {
		if value, ok := p.annotations[key]; ok && anyMatch([]string{pattern}, value) {
			return false
		}
	}
	return true
}

// anyMatch matches against patterns that check has accepted.
func anyMatch(patterns []string, value string) bool {
	for _, p := range patterns {
		if ok, _ := path.Match(p, value); ok {
			return true
		}
	}
	return false
}
