package datagram

// Traffic to port 53, judged by its content. A flow of DNS ends when its questions are answered,
// and is forgotten soon if they are not: a resolver makes one flow for each question. Tunnels and
// games use that port too; there many datagrams answer one, and come late.

// outlasts notes that the flow carries more than questions and answers.
func (fl *Flow) outlasts() {
	if fl.short.Swap(false) {
		fl.Lease.Outlast()
	}
}
