package sandbox

// The flow log between monitor and worker: who opens its files, and who asks for the next.

import (
	"fmt"

	"sluice.dev/sluice/sandbox/api"
	"sluice.dev/sluice/sandbox/internal/channel"
	"sluice.dev/sluice/sandbox/internal/process"
)

// nextFlowLog answers a worker whose file is full. It is called by the link's reader and
// must not block that.
func (m *monitor) nextFlowLog(l *process.WorkerLink) {
	if m.flowLog == nil || l.LogWants.Add(1) > 1 {
		return // whoever sees to the wish before this one sees to this, too
	}
	// Ends with what the file system takes for some renames; FlowFile.close waits for that.
	go func() {
		for seen := int64(1); seen > 0; seen = l.LogWants.Add(-seen) {
			seen = l.LogWants.Load()
			m.giveFlowLog(l)
		}
	}()
}

// giveFlowLog hands the next file to a worker, or tells it that there is none.
func (m *monitor) giveFlowLog(l *process.WorkerLink) {
	if m.flowLog.Rotate() == nil {
		if f, err := m.flowLog.Dup(); err == nil {
			defer f.Close()
			_ = l.Post(channel.MsgFlowLog, nil, channel.FDOf(f))
			return
		}
	}
	_ = l.Post(channel.MsgFlowLog, nil) // it writes on
}

// reopenFlowLog has the flow log written to what is now at its path. When it returns, the
// worker has at most one write under way to what was there before.
func (m control) reopenFlowLog() (any, error) {
	m.change.Lock()
	defer m.change.Unlock()
	if m.flowLog == nil || m.flowLog.Path == "" {
		return nil, &api.Error{Code: api.CodeInvalid, Message: "there is no flow log in a file of its own name, and so nothing to open again"}
	}
	if err := m.flowLog.Reopen(); err != nil {
		return nil, fmt.Errorf("open the flow log again: %w: it is written on as it was", err)
	}
	f, err := m.flowLog.Dup()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := m.tell(channel.MsgFlowLog, nil, channel.FDOf(f)); err != nil {
		return nil, fmt.Errorf("pass the flow log on: %w", err)
	}
	m.log.Infof("monitor", "the flow log was opened again")
	return api.FlowLogResult{File: m.flowLog.Path}, nil
}
