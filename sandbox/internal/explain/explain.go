package explain

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// An error that a user may meet on an unfamiliar machine names the cause and the cure.

// switchOff is a setting that forbids user namespaces.
type switchOff struct {
	path, value string
	cure        string
}

var userNamespaceSwitches = []switchOff{
	{"/proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=15000"},
	{"/proc/sys/user/max_net_namespaces", "0", "sysctl user.max_net_namespaces=15000"},
	{"/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"},
	{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "an AppArmor profile for sluice with the rule \"userns,\", or sysctl kernel.apparmor_restrict_unprivileged_userns=0"},
}

// refusal returns the setting that keeps this user from having user namespaces, or "".
func refusal() string {
	for _, s := range userNamespaceSwitches {
		b, err := os.ReadFile(s.path)
		if err != nil || strings.TrimSpace(string(b)) != s.value {
			continue
		}
		if os.Geteuid() == 0 && strings.Contains(s.path, "unprivileged") {
			continue
		}
		name := strings.ReplaceAll(strings.TrimPrefix(s.path, "/proc/sys/"), "/", ".")
		return fmt.Sprintf("user namespaces are off for this user (%s is %s); as root: %s", name, s.value, s.cure)
	}
	return ""
}

func ExplainClone(err error) error {
	const doing = "making the sandbox's namespaces"
	if why := refusal(); why != "" {
		return fmt.Errorf("%s: %s (%w)", doing, why, err)
	}
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EUSERS):
		return fmt.Errorf("%s: too many namespaces, or nested too deep: end some, or raise user.max_user_namespaces, user.max_net_namespaces and user.max_mnt_namespaces (%w)", doing, err)
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%s: this process may not make a user namespace: in a container, allow clone and unshare in its seccomp profile; in a chroot, leave it (%w)", doing, err)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%s: this kernel is built without user namespaces (CONFIG_USER_NS) (%w)", doing, err)
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return fmt.Errorf("%s: out of processes, memory or descriptors: see ulimit -u and -n (%w)", doing, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

func ExplainMaps(err error) error {
	if why := refusal(); why != "" {
		return fmt.Errorf("mapping the sandbox's ids: %s (%w)", why, err)
	}
	return fmt.Errorf("mapping the sandbox's ids: %w", err)
}

// ExplainInside explains errors of the stage's own steps: under AppArmor's restriction the
// namespaces are made, but the first use of a capability in them fails.
func ExplainInside(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		if why := refusal(); why != "" {
			return fmt.Errorf("%s (%w)", why, err)
		}
	}
	return err
}
