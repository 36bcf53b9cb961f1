package aegis_test

import (
	"bytes"
	"encoding/json"
	"reflect"
	"runtime"
	"testing"
	"time"

	"github.com/aegistrader/aegis"
)

// gobbledygook is a codec as a user might define it: JSON with every bit flipped.
type gobbledygook struct{}

func (gobbledygook) ContentType() string { return "application/gobbledygook" }

func (gobbledygook) Marshal(v any) ([]byte, error) {
	data, err := json.Marshal(v)
	return flip(data), err
}

func (gobbledygook) Unmarshal(data []byte, v any) error { return json.Unmarshal(flip(data), v) }

func flip(data []byte) []byte {
	out := make([]byte, len(data))
	for i, b := range data {
		out[i] = ^b
	}
	return out
}

type everything struct {
	B     bool
	I     int64 `json:"i"`
	U     uint8
	F     float64
	S     string `json:"s,omitempty"`
	D     []byte
	L     []string
	M     map[string]int
	P     *everything `json:"p,omitempty"`
	T     time.Time
	Any   any
	Skip  string `json:"-"`
	inner int
}

func TestCodecs(t *testing.T) {
	t.Parallel()
	in := everything{B: true, I: -5, U: 200, F: 1.5, S: "ü", D: []byte{0, 255}, L: []string{"a", ""}, M: map[string]int{"x": 1},
		P: &everything{S: "deep"}, T: time.Unix(1e9, 5).UTC(), Any: "a", Skip: "skipped", inner: 3}
	want := in
	want.Skip, want.inner = "", 0
	for _, c := range []aegis.Codec{aegis.MsgPack, aegis.JSON} {
		data, err := c.Marshal(&in)
		if err != nil {
			t.Fatal(err)
		}
		again, _ := c.Marshal(&in)
		if !bytes.Equal(data, again) {
			t.Errorf("%s: equal values have different encodings", c.ContentType())
		}
		var out everything
		if err := c.Unmarshal(data, &out); err != nil {
			t.Fatal(err)
		}
		out.T, out.P.T = out.T.UTC(), out.P.T.UTC()
		want := want
		want.P = out.P
		if out.P.S != "deep" || !reflect.DeepEqual(out, want) {
			t.Errorf("%s: got %+v, want %+v", c.ContentType(), out, want)
		}
		var raw map[string]any
		if err := c.Unmarshal(data, &raw); err != nil || raw["s"] != "ü" || raw["Skip"] != nil {
			t.Errorf("%s: got %v, %v", c.ContentType(), raw, err)
		}
	}
}

func TestMsgPackRejectsMalformedInput(t *testing.T) {
	t.Parallel()
	for name, data := range map[string][]byte{
		"empty input":           {},
		"the unused code 0xc1":  {0xc1},
		"two values":            {1, 2},
		"half a float":          {0xcb, 1, 2, 3},
		"half a string":         {0xd9, 5, 'a'},
		"half a length":         {0xdb, 0, 0},
		"an array of 4 billion": {0xdd, 0xff, 0xff, 0xff, 0xff},
		"a map of 4 billion":    {0xdf, 0xff, 0xff, 0xff, 0xff, 1, 1},
		"bytes of 4 GB":         {0xc6, 0xff, 0xff, 0xff, 0xff, 1},
		"an extension of 4 GB":  {0xc9, 0xff, 0xff, 0xff, 0xff, 1, 1},
		"a million levels":      append(bytes.Repeat([]byte{0x91}, 1_000_000), 1),
		"129 levels":            append(bytes.Repeat([]byte{0x91}, 129), 1),
		"a map without a value": {0x82, 1, 1, 2},
		"an unhashable key":     {0x81, 0x91, 1, 1},
	} {
		var m map[any]any
		if err := aegis.MsgPack.Unmarshal(data, &m); err == nil {
			t.Errorf("%s: no error", name)
		}
		var v any
		if err := aegis.MsgPack.Unmarshal(data, &v); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	var v any
	if err := aegis.MsgPack.Unmarshal(append(bytes.Repeat([]byte{0x91}, 128), 1), &v); err != nil {
		t.Error(err)
	}
}

// FuzzMsgPack checks that malformed input causes no panic, and no more allocations than are proportionate to its length.
func FuzzMsgPack(f *testing.F) {
	for _, v := range []any{1, "s", []int{1, 2}, map[string]any{"i": 1, "L": []string{"a"}, "P": map[string]any{"M": map[string]int{"x": 1}}}, everything{}} {
		data, err := aegis.MsgPack.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte{0xdd, 0x00, 0xff, 0xff, 0xff})
	f.Add([]byte{0x81, 0xa1, 'L', 0xdd, 0x00, 0xff, 0xff, 0xff})
	f.Add([]byte{0x81, 0xa1, 'M', 0xdf, 0x00, 0xff, 0xff, 0xff})
	f.Add(bytes.Repeat([]byte{0x91}, 200))
	element := uint64(reflect.TypeFor[everything]().Size())
	f.Fuzz(func(t *testing.T, data []byte) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		var list []everything
		_ = aegis.MsgPack.Unmarshal(data, &list)
		var one everything
		_ = aegis.MsgPack.Unmarshal(data, &one)
		var v any
		_ = aegis.MsgPack.Unmarshal(data, &v)
		runtime.ReadMemStats(&after)
		if got, most := after.TotalAlloc-before.TotalAlloc, 256<<10+uint64(len(data))*4*element; got > most {
			t.Errorf("%d bytes of input took %d bytes of memory, want at most %d", len(data), got, most)
		}
	})
}
