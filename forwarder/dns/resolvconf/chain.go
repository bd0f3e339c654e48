package resolvconf

// The chain of a path: every directory whose entries a lookup of the path consults, with symlinks
// followed, and the file at its end. A change to any of those entries may change which file the
// path names.

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
)

// maxLinks is the kernel's own limit on symlinks in a lookup.
const maxLinks = 40

var errLinkLoop = errors.New("too many levels of symbolic links")

// pathChain says where to watch for changes.
type pathChain struct {
	entries map[string]map[string]bool // directory → names looked up in it
	file    string                     // at the end, free of symlinks; may not exist
}

// resolveChain follows path, which is absolute, as far as it exists. A missing element is no error:
// its nearest existing directory is part of the chain.
func resolveChain(path string) (pathChain, error) {
	ch := pathChain{entries: make(map[string]map[string]bool)}
	todo := split(path)
	dir, links := "/", 0
	for len(todo) > 0 {
		elem := todo[0]
		todo = todo[1:]
		if elem == ".." {
			dir = filepath.Dir(dir)
			continue
		}
		if ch.entries[dir] == nil {
			ch.entries[dir] = make(map[string]bool)
		}
		ch.entries[dir][elem] = true
		at := filepath.Join(dir, elem)
		fi, err := os.Lstat(at)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			ch.file = filepath.Join(append([]string{at}, todo...)...)
			return ch, nil
		case err != nil:
			return ch, err
		case fi.Mode()&fs.ModeSymlink == 0:
			dir = at // of the last element this is the file
			continue
		}
		if links++; links > maxLinks {
			return ch, &fs.PathError{Op: "following", Path: path, Err: errLinkLoop}
		}
		target, err := os.Readlink(at)
		if err != nil {
			return ch, err
		}
		if filepath.IsAbs(target) {
			dir = "/"
		}
		todo = append(split(target), todo...)
	}
	ch.file = dir
	return ch, nil
}

func split(path string) []string {
	var out []string
	for elem := range strings.SplitSeq(path, "/") {
		if elem != "" && elem != "." {
			out = append(out, elem)
		}
	}
	return out
}

func (ch pathChain) equal(other pathChain) bool {
	return ch.file == other.file && maps.EqualFunc(ch.entries, other.entries, maps.Equal)
}
