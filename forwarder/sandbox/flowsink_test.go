package sandbox

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sinkOn makes a sink that writes to l, which is asked as a monitor is; ask may change
// what is answered.
func sinkOn(t *testing.T, l *flowFile, ask func(func())) *flowSink {
	t.Helper()
	f, err := l.dup()
	must(t, err)
	s := newFlowSink(f, time.Now, slog.New(slog.DiscardHandler))
	s.max = l.maxSize
	answer := func() {
		if l.rotate() == nil {
			if f, err := l.dup(); err == nil {
				s.hand(f)
				return
			}
		}
		s.hand(nil)
	}
	s.want = func() { ask(answer) }
	t.Cleanup(func() { s.out.(*os.File).Close() })
	return s
}

// records counts the lines of all files of a log, which must be those that were written,
// and tells the largest file.
func records(t *testing.T, name string) (seen map[string]int, largest int64) {
	t.Helper()
	seen = make(map[string]int)
	files, err := filepath.Glob(name + "*")
	must(t, err)
	for _, f := range files {
		b, err := os.ReadFile(f)
		must(t, err)
		largest = max(largest, int64(len(b)))
		for line := range strings.Lines(string(b)) {
			var n, size int
			if _, err := fmt.Sscanf(line, "record %d of %d ", &n, &size); err != nil || len(line) != size+1 {
				t.Fatalf("%s has %q, which is no whole record", f, line)
			}
			seen[line]++
		}
	}
	return seen, largest
}

func testRecord(n, size int) []byte {
	line := fmt.Appendf(nil, "record %d of %d ", n, size)
	return append(line, bytes.Repeat([]byte{'x'}, size-len(line))...)
}

func TestNoRecordIsLostOrCutWhenTheFileChanges(t *testing.T) {
	name := filepath.Join(t.TempDir(), "flows")
	l, said := openTestLog(t, name, minFlowLogSize, 1000)
	s := sinkOn(t, l, func(answer func()) { go answer() })
	const n = 3000
	for i := range n {
		s.add(testRecord(i, 100+i%900))
		switch {
		case i%7 == 0:
			s.flush()
		case i%100 == 50:
			s.settle()
		}
	}
	s.settle()
	seen, largest := records(t, name)
	if len(seen) != n || s.written.Load() != n || s.unwritten.Load() != 0 || s.unrotated.Load() != 0 || s.files.Load() < 100 || len(warnings(said)) != 0 {
		t.Errorf("%d records in the files, %d written, %d not, %d files, %d not rotated; %q",
			len(seen), s.written.Load(), s.unwritten.Load(), s.files.Load(), s.unrotated.Load(), warnings(said))
	}
	if largest > minFlowLogSize {
		t.Errorf("the largest file has %d bytes, want at most %d", largest, minFlowLogSize)
	}
}

func TestARecordLongerThanAFileHasOneOfItsOwn(t *testing.T) {
	name := filepath.Join(t.TempDir(), "flows")
	l, _ := openTestLog(t, name, minFlowLogSize, 10)
	s := sinkOn(t, l, func(answer func()) { answer() })
	for i := range 4 {
		s.add(testRecord(i, 100+i%2*2*minFlowLogSize))
	}
	s.settle()
	if seen, largest := records(t, name); len(seen) != 4 || largest > 2*minFlowLogSize+101+101 {
		t.Errorf("%d records, the largest file has %d bytes", len(seen), largest)
	}
}

func TestWithoutANextFileTheOldOneIsWrittenOn(t *testing.T) {
	for _, row := range []struct {
		name string
		ask  func(s **flowSink) func(func())
	}{
		{"refused", func(s **flowSink) func(func()) { return func(func()) { (*s).hand(nil) } }},
		{"no answer", func(s **flowSink) func(func()) { return func(func()) {} }},
	} {
		t.Run(row.name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "flows")
			l, _ := openTestLog(t, name, minFlowLogSize, 3)
			var s *flowSink
			s = sinkOn(t, l, row.ask(&s))
			now := time.Now()
			s.now = func() time.Time { return now }
			for i := range 100 {
				s.add(testRecord(i, 500))
			}
			s.settle()
			if seen, _ := records(t, name); len(seen) != 100 || s.unrotated.Load() != 1 || s.unwritten.Load() != 0 {
				t.Fatalf("%d records, %d times unrotated, %d unwritten", len(seen), s.unrotated.Load(), s.unwritten.Load())
			}
			now = now.Add(sinkRetry + 1)
			s.want = func() {
				must(t, l.rotate())
				f, err := l.dup()
				must(t, err)
				s.hand(f)
			}
			s.add(testRecord(100, 500))
			s.settle()
			if seen, _ := records(t, name); len(seen) != 101 || s.files.Load() != 1 {
				t.Errorf("%d records, %d files: it does not ask again", len(seen), s.files.Load())
			}
		})
	}
}

// shortDisk takes so many bytes, and then none until it is given more.
type shortDisk struct {
	bytes.Buffer
	room int
}

func (d *shortDisk) Write(b []byte) (int, error) {
	n := min(len(b), d.room)
	d.room -= n
	d.Buffer.Write(b[:n])
	if n < len(b) {
		return n, unix.ENOSPC
	}
	return n, nil
}

func TestARecordThatWasCutIsCompletedFirst(t *testing.T) {
	disk := &shortDisk{room: 250}
	s := newFlowSink(disk, time.Now, slog.New(slog.DiscardHandler))
	for i := range 5 {
		s.add(testRecord(i, 99)) // two whole ones, half of a third; two are lost
	}
	s.flush()
	disk.room = 10
	s.add(testRecord(5, 99)) // and this
	s.flush()
	s.flush()
	disk.room = 1000
	s.add(testRecord(6, 99))
	s.flush()
	var got []string
	for line := range strings.Lines(disk.String()) {
		got = append(got, strings.Fields(line)[1])
		if len(line) != 100 {
			t.Errorf("%q is no whole record", line)
		}
	}
	if strings.Join(got, " ") != "0 1 2 6" || s.written.Load() != 4 || s.unwritten.Load() != 3 || len(s.buf) != 0 {
		t.Errorf("records %v, %d written, %d not, %d bytes kept", got, s.written.Load(), s.unwritten.Load(), len(s.buf))
	}
}

// TestFlowLogTakesNoMoreThanItsBounds: while the next file does not come, records wait in
// the buffer and then in the queue; those that find no room are counted.
func TestFlowLogTakesNoMoreThanItsBounds(t *testing.T) {
	name := filepath.Join(t.TempDir(), "flows")
	file, _ := openTestLog(t, name, 64<<10, 1000)
	f, err := file.dup()
	must(t, err)
	l := newFlowLog(f, time.Now, slog.New(slog.DiscardHandler))
	asked := make(chan func(), 100)
	s := l.sink
	s.max, s.want = file.maxSize, func() {
		select {
		case asked <- func() {
			must(t, file.rotate())
			f, err := file.dup()
			must(t, err)
			s.hand(f)
		}:
		default:
		}
	}
	go l.run()
	const n = 20000
	for i := range n {
		l.onEvent(destroy(uint64(i)))
	}
	lost := l.lost.Load()
	stop := make(chan struct{})
	answering := make(chan struct{})
	go func() {
		defer close(answering)
		for {
			select {
			case answer := <-asked:
				answer()
			case <-stop:
				return
			}
		}
	}()
	l.close()
	close(stop)
	<-answering
	if lost == 0 || s.unwritten.Load() != 0 || s.written.Load()+l.lost.Load() != n {
		t.Errorf("%d lost, %d written, %d unwritten of %d", l.lost.Load(), s.written.Load(), s.unwritten.Load(), n)
	}
}

func TestAPipeThatNobodyReadsDoesNotKeepTheWorker(t *testing.T) {
	fds := make([]int, 2)
	must(t, unix.Pipe2(fds, unix.O_CLOEXEC|unix.O_NONBLOCK))
	defer unix.Close(fds[0])
	out := os.NewFile(uintptr(fds[1]), "pipe")
	defer out.Close()
	l := newFlowLog(out, time.Now, slog.New(slog.DiscardHandler))
	go l.run()
	const n = 2000
	for i := range n {
		l.onEvent(destroy(uint64(i)))
	}
	began := time.Now()
	l.close()
	if took := time.Since(began); took > sinkPatience+20*time.Second || l.sink.unwritten.Load() == 0 || l.sink.written.Load()+l.sink.unwritten.Load()+l.lost.Load() != n {
		t.Errorf("closed after %s; %+v", took, l.stats())
	}
}
