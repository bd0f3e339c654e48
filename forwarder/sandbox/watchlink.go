package sandbox

// watchLink says why the device stopped; it ends with it.
func (w *worker) watchLink() {
	<-w.link.Done()
	if err := w.link.Err(); err != nil && w.ctx.Err() == nil {
		w.log.Warn("the device: " + err.Error())
	}
}
