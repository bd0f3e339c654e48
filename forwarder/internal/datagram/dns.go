package datagram

// What goes to port 53, judged by what it is. A flow of DNS is over when its questions are
// answered, and is forgotten soon if they are not: a resolver makes one for each question.
// Tunnels and games use that port too, where many datagrams answer one, and come late.

// outlasts notes that the flow is not of questions and answers alone.
func (fl *Flow) outlasts() {
	if fl.short.Swap(false) {
		fl.Lease.Outlast()
	}
}
