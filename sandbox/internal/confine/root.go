package confine

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// mountPoints are directories that exist on some systems at least. The new root is mounted on one
// of them for a moment, and it does not matter which.
var mountPoints = []string{"/tmp", "/proc", "/run", "/dev", "/sys", "/usr"}

// emptyRoot makes an empty tmpfs the root of the process and unmounts everything else. The mount
// namespace is the process's own, so no other process sees it.
func emptyRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private (not in a mount namespace of our own?): %w", err)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	at, err := "", error(nil)
	for _, dir := range mountPoints {
		if err = unix.Mount("sluice", dir, "tmpfs", flags, "mode=0555,nr_inodes=1,size=4096"); err == nil {
			at = dir
			break
		}
	}
	if err != nil {
		return fmt.Errorf("mount a tmpfs: %w", err)
	}
	if err := unix.Chdir(at); err != nil {
		return err
	}
	switch err := unix.PivotRoot(".", "."); {
	case err == nil:
		// The old root now lies over the new one at ".".
		if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount the old root: %w", err)
		}
	case errors.Is(err, unix.EINVAL):
		// The root is the initramfs, which cannot be pivoted away from: move over it.
		if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move to the root: %w", err)
		}
		if err := unix.Chroot("."); err != nil {
			return fmt.Errorf("change the root: %w", err)
		}
	default:
		return fmt.Errorf("pivot the root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY|flags, ""); err != nil {
		return fmt.Errorf("make the root read-only: %w", err)
	}
	return nil
}
